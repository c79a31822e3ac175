"""What happens during a run: validation, checkpoints, stopping, resuming, logs and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import task_config, write_bert, write_data, write_llama

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lora_kernels.errors import ConfigError, LoraKernelsError  # noqa: E402
from lora_kernels.training import Predictor, finetune  # noqa: E402
from lora_kernels.training.checkpoint_home import checkpoint_folder  # noqa: E402


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return write_bert(folder / "model"), write_data("classification", folder, 64)


def config(pair: tuple[Path, Path], output: Path, **train: Any) -> dict[str, Any]:
    return task_config("classification", *pair, output, **train)


def test_pictures_log_and_card(pair: Any, tmp_path: Path) -> None:
    result = finetune(config(pair, tmp_path / "run", max_steps=4, eval_steps=2), quiet=True)
    for name in ("loss.png", "metrics.png", "confusion.png"):
        assert (result.output / name).read_bytes().startswith(b"\x89PNG")
    log = [json.loads(line) for line in (result.output / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log if "loss" in e] == [1, 2, 3, 4]
    assert [e["step"] for e in log if "eval_loss" in e] == [2, 4]
    validated = next(e for e in log if "eval_loss" in e)
    assert {"eval_accuracy", "eval_f1", "eval_auc_roc"} <= set(validated)
    curves = result.report["curves"]
    assert [step for step, _ in curves["accuracy"]] == [2, 4]
    counts = result.report["confusion"]["counts"]
    assert sum(map(sum, counts)) == result.report["examples"]["test"]
    hits = sum(row[i] for i, row in enumerate(counts))
    assert hits / sum(map(sum, counts)) == pytest.approx(result.report["after"])
    card = (result.adapter / "README.md").read_text()
    assert card.startswith("---\nbase_model: ") and "library_name: peft" in card
    assert "base_model:adapter:" in card and "auc_roc, test" in card
    page = (result.output / "report.md").read_text()
    assert all(word in page for word in ("tokens and", "MiB", "metrics.png", "confusion.png"))


def test_the_best_checkpoint_is_kept(pair: Any, tmp_path: Path) -> None:
    """A rate that ruins the model after a while: the last step is not the best one."""
    settings = config(
        pair, tmp_path / "run", max_steps=24, eval_steps=4, keep_best=True, learning_rate=3e-2,
        scheduler="constant", lr_warmup=0.0,
    )  # fmt: skip
    settings["metric"] = "loss"
    result = finetune(settings, quiet=True)
    report = result.report
    losses = dict(report["validation_losses"])
    best = min(losses, key=losses.get)
    assert report["best_step"] == best
    assert report["steps"] == 24 and not report["stopped_early"]
    assert not checkpoint_folder(result.output).exists()
    assert not (result.output / "checkpoints").exists()
    # At a constant rate a run that ends there takes the same steps.
    assert best < 24, "the case that is meant does not occur"
    short = {**settings, "output": str(tmp_path / "short")}
    short["train"] = {**settings["train"], "keep_best": False, "max_steps": best}
    name = "adapter_model.safetensors"
    expected = (finetune(short, quiet=True).adapter / name).read_bytes()
    assert (result.adapter / name).read_bytes() == expected


@pytest.mark.parametrize(
    "method",
    ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("qlora", "freeze", "full"))],
)
def test_early_stopping_for_every_kind_of_method(pair: Any, tmp_path: Path, method: str) -> None:
    settings = config(
        pair, tmp_path / "run", max_steps=40, eval_steps=1, early_stopping=2, learning_rate=1e-12
    )
    report = finetune({**settings, "method": method}, quiet=True).report
    # Nothing is learnt at this rate: the first validation stays the best in accuracy.
    assert report["stopped_early"] and report["steps"] == 3 and report["best_step"] == 1
    assert Predictor(tmp_path / "run")(["anna likes rome"])[0]["label"] in ("near", "far")


def test_checkpoints_move_into_the_finished_run(pair: Any, tmp_path: Path) -> None:
    settings = config(pair, tmp_path / "run", max_steps=6, save_steps=2, save_total_limit=2)
    result = finetune(settings, quiet=True)
    kept = sorted(p.name for p in (result.output / "checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-6"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


class Killed(Exception):
    """Stands for a process that dies."""


def test_a_killed_run_goes_on_to_the_same_adapter(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_kernels.training.callbacks import StepTimer

    settings = config(pair, tmp_path / "whole", max_steps=6, save_steps=2)
    whole = finetune(settings, quiet=True)

    real = StepTimer.on_step_begin

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise Killed
        real(self, args, state, control, **kwargs)

    settings["output"] = str(tmp_path / "cut")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StepTimer, "on_step_begin", die)
        finetune(settings, quiet=True)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(ConfigError, match="resume=auto"):
        finetune(settings, quiet=True)
    with pytest.raises(ConfigError, match=r"lora\.alpha=9 differs from the 8"):
        finetune({**settings, "lora": {"r": 4, "alpha": 9}, "resume": "auto"}, quiet=True)
    resumed = finetune({**settings, "resume": "auto"}, quiet=True)
    name = "adapter_model.safetensors"
    assert (resumed.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()
    assert resumed.report["losses"] == whole.report["losses"]
    assert resumed.report["steps"] == 6 and resumed.report["steps_timed"] == 2
    log = [json.loads(line) for line in (resumed.output / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log if "loss" in e] == [1, 2, 3, 4, 5, 6]


def test_resume_auto_begins_anew_where_nothing_was_saved(pair: Any, tmp_path: Path) -> None:
    settings = config(pair, tmp_path / "run", max_steps=2, save_steps=2)
    assert finetune({**settings, "resume": "auto"}, quiet=True).report["steps"] == 2


def test_options_reach_the_trainer(pair: Any, tmp_path: Path) -> None:
    from lora_kernels.training.arguments import training_arguments
    from lora_kernels.training.config_reader import read_config
    from lora_kernels.training.tasks import task_class

    settings = read_config(
        config(pair, tmp_path / "run"),
        ["train.max_grad_norm=0.5", "train.weight_decay=0.1", "train.scheduler=cosine",
         "train.lr_warmup=0.2", "train.gradient_accumulation=3", "train.label_smoothing=0.1",
         "train.eval_steps=5", "train.save_steps=10", "train.save_total_limit=2",
         "train.keep_best=true"],
    )  # fmt: skip
    task = task_class("classification").from_config(settings)
    told = training_arguments(settings, task, "bf16", "cpu", tmp_path, evaluate=True)
    assert told.max_grad_norm == 0.5 and told.weight_decay == 0.1 and told.bf16
    assert told.lr_scheduler_type == "cosine" and told.warmup_steps == 0.2
    assert told.gradient_accumulation_steps == 3 and told.label_smoothing_factor == 0.1
    assert told.eval_strategy == told.save_strategy == "steps"
    assert (told.eval_steps, told.save_steps, told.save_total_limit) == (5, 10, 2)
    assert told.load_best_model_at_end and told.metric_for_best_model == "accuracy"
    assert told.greater_is_better and told.per_device_eval_batch_size == 64


def test_loraplus_changes_the_training(pair: Any, tmp_path: Path) -> None:
    reports = [
        finetune(config(pair, tmp_path / f"run{ratio}", loraplus_ratio=ratio), quiet=True).report
        for ratio in (1.0, 8.0)
    ]
    losses = [report["losses"] for report in reports]
    assert losses[0][0] == losses[1][0] and losses[0] != losses[1]


def test_a_diverged_training_writes_nothing(pair: Any, tmp_path: Path) -> None:
    settings = config(pair, tmp_path / "run", max_steps=30, learning_rate=1e30, max_grad_norm=0.0,
                      lr_warmup=0.0)  # fmt: skip
    with pytest.raises(LoraKernelsError, match="diverged"):
        finetune(settings, quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_activation_checkpointing_of_frozen_models(tmp_path: Path) -> None:
    pair = write_llama(tmp_path / "model"), write_data("causal-lm", tmp_path)
    for method in ("freeze", "qlora", "lora"):
        found = []
        for name, recompute in (("a", False), ("b", True)):
            settings = task_config(
                "causal-lm", *pair, tmp_path / (method + name), checkpointing=recompute
            )
            found.append(finetune({**settings, "method": method}, quiet=True).report["losses"])
        assert found[0] == found[1]


@pytest.mark.parametrize("precision", ["bf16", "bf16-weights"])
def test_lower_precisions_learn(pair: Any, tmp_path: Path, precision: str) -> None:
    from safetensors.torch import load_file

    settings = config(pair, tmp_path / "run", max_steps=3)
    result = finetune({**settings, "precision": precision}, quiet=True)
    tensors = load_file(result.adapter / "adapter_model.safetensors")
    expected = torch.float32 if precision == "bf16" else torch.bfloat16
    assert {t.dtype for t in tensors.values()} == {expected}
    assert Predictor(result.output)(["anna likes rome"])[0]["label"] in ("near", "far")


def test_tensorboard_writes_beside_the_adapter(pair: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    settings = config(pair, tmp_path / "run", max_steps=1)
    result = finetune({**settings, "trackers": ["tensorboard"]}, quiet=True)
    assert list((result.output / "tensorboard").glob("events.*"))
