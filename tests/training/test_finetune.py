"""The whole job on a tiny model: files, keys, parity with stock PEFT, and failures half-way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bert import make_texts, tiny_config, write_csv, write_model

from lora_kernels.errors import AdapterFileError, ConfigError, DataError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lora_kernels.training import Predictor, Result, finetune  # noqa: E402

REPORT_KEYS = {
    "task", "model", "dataset", "metric", "before", "after", "after_stock", "seconds",
    "seconds_stock", "speedup", "fused_layers", "total_layers", "adapter", "lora_kernels",
    "torch", "device",
}  # fmt: skip


@pytest.fixture(scope="module")
def compared(tiny_model: Path, texts_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run long enough to learn the task, with and without the kernels."""
    output = tmp_path_factory.mktemp("runs") / "compared"
    config = tiny_config(tiny_model, texts_csv, output, max_steps=30)
    return finetune({**config, "compare_stock": True}, quiet=True)


def test_files_and_report(compared: Result, texts_csv: Path) -> None:
    names = {str(p.relative_to(compared.output)) for p in compared.output.rglob("*") if p.is_file()}
    assert {"report.json", "report.md", "loss.png", "adapter/adapter_model.safetensors",
            "adapter/adapter_config.json", "adapter/lora_kernels.json"} <= names  # fmt: skip
    assert list(compared.output.parent.iterdir()) == [compared.output]

    report = json.loads((compared.output / "report.json").read_text())
    assert report == json.loads(json.dumps(compared.report))
    assert set(report) >= REPORT_KEYS
    assert report["dataset"] == str(texts_csv)
    assert report["examples"] == {"train": 56, "validation": 8, "test": 16}
    assert report["steps"] == len(report["losses"]) == len(report["losses_stock"]) == 30
    # query, key, value, attention output and two of the MLP per layer, and the pooler
    assert report["fused_layers"] == report["total_layers"] == 13
    assert (compared.output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_training_learns_and_kernels_change_nothing(compared: Result) -> None:
    report = compared.report
    assert report["after"] >= 0.9 and report["after"] > report["before"]
    assert report["after_stock"] == report["after"]
    ours = torch.tensor([loss for _, loss in report["losses"]], dtype=torch.float64)
    stock = torch.tensor([loss for _, loss in report["losses_stock"]], dtype=torch.float64)
    # Rounding differs; a lost LoRA term or another data order would differ as much as one step.
    one_step = ours.diff().abs().mean()
    assert (ours - stock).abs().max() < one_step / 10
    assert ours[-1] < ours[0] / 2


def test_table_names_what_was_measured(compared: Result) -> None:
    lines = str(compared).splitlines()
    assert lines[0].split() == ["accuracy", "seconds", "ms/step"]
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        "before", "after, lora_kernels", "after, stock PEFT",
    ]  # fmt: skip
    assert "13 of 13 layers fused" in str(compared)
    page = (compared.output / "report.md").read_text()
    assert "stock PEFT" in page and "13 of 13" in page and "seed 0" in page


def test_adapter_is_what_peft_reads(compared: Result, tiny_model: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(compared.adapter / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert any("lora_B" in key and t.abs().max() > 0 for key, t in tensors.items())
    assert any(key.endswith("classifier.weight") for key in tensors)

    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    model = peft.PeftModel.from_pretrained(base, compared.adapter).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    batch = tokenizer(
        ["the striker goal match cup", "bank shares profit"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**batch).logits.softmax(-1)
    answers = Predictor(compared.output)(["the striker goal match cup", "bank shares profit"])
    assert [a["label"] for a in answers] == ["sport", "money"]
    for row, answer in zip(expected, answers, strict=True):
        assert list(answer["probabilities"]) == ["money", "sport"]
        assert answer["probability"] == max(answer["probabilities"].values())
        assert row.argmax() == ["money", "sport"].index(answer["label"])


def test_same_seed_same_adapter(tiny_model: Path, texts_csv: Path, tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = tiny_config(tiny_model, texts_csv, tmp_path / name)
        result = finetune(config, [f"seed={seed}"], quiet=True)
        files.append((result.adapter / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_bf16_keeps_the_adapter_in_fp32(tiny_model: Path, texts_csv: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = tiny_config(tiny_model, texts_csv, tmp_path / "run", max_steps=30)
    result = finetune({**config, "precision": "bf16", "compare_stock": True}, quiet=True)
    assert result.report["precision"] == "bf16"
    assert result.report["after"] >= 0.9 and result.report["after_stock"] >= 0.9
    tensors = load_file(result.adapter / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert Predictor(result.output)(["goal striker match cup"])[0]["label"] == "sport"


def test_without_kernels_and_with_checkpointing(
    tiny_model: Path, texts_csv: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_model, texts_csv, tmp_path / "a", checkpointing=True)
    plain = finetune({**config, "kernels": False}, quiet=True).report
    fused = finetune({**config, "output": str(tmp_path / "b")}, quiet=True).report
    assert plain["fused_layers"] == plain["total_layers"] == 0
    assert plain["after_stock"] is plain["speedup"] is None
    for (_, a), (_, b) in zip(plain["losses"], fused["losses"], strict=True):
        assert abs(a - b) < abs(plain["losses"][0][1] - plain["losses"][-1][1])


def test_base_dropout_and_attention_reach_the_model(
    tiny_model: Path, texts_csv: Path, tmp_path: Path
) -> None:
    from lora_kernels.training.config_reader import read_config
    from lora_kernels.training.one_run import load_options

    config = tiny_config(tiny_model, texts_csv, tmp_path / "run")
    assert load_options(read_config(config), str(tiny_model)) == {}
    config = read_config(config, ["train.base_dropout=0.25", "attention=eager"])
    options = load_options(config, str(tiny_model))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model, **options)
    assert model.config._attn_implementation == "eager"
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


def test_attention_of_this_package(tiny_model: Path, texts_csv: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_model, texts_csv, tmp_path / "eager")
    eager = finetune(config, ["attention=eager"], quiet=True).report
    config = {**config, "output": str(tmp_path / "ours")}
    ours = finetune(config, ["attention=lora_kernels"], quiet=True).report
    assert ours["losses"] != eager["losses"]
    for (_, a), (_, b) in zip(eager["losses"], ours["losses"], strict=True):
        assert abs(a - b) < abs(eager["losses"][0][1] - eager["losses"][-1][1])


def test_separate_files_and_guessed_columns(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_csv(tmp_path / "train.csv", make_texts(20))
    rows = [{"id": i, "review": t, "topic": y} for i, (t, y) in enumerate(make_texts(5, seed=1))]
    train.write_text("id,review,topic\n" + "\n".join(
        f"{i},{text},{label}" for i, (text, label) in enumerate(make_texts(20))
    ))  # fmt: skip
    test = tmp_path / "test.jsonl"
    test.write_text("\n".join(json.dumps(row) for row in rows))
    config: dict[str, Any] = tiny_config(tiny_model, train, tmp_path / "run", max_steps=1)
    config["data"] |= {"test": str(test), "validation_fraction": 0.0}
    report = finetune(config).report
    assert report["examples"] == {"train": 40, "validation": 0, "test": 10}
    assert report["validation_losses"] == []
    notes = capsys.readouterr().err
    assert "text='review', label='topic'" in notes and "money (25), sport (25)" in notes


@pytest.mark.parametrize(
    ("lines", "error", "fragment"),
    [
        (["text,label", "a,x", "b,x"], DataError, "only the class 'x'"),
        (["text,label", ",x", ",y"], DataError, "every row has an empty"),
        (["one,two", "a,x"], DataError, "set data.text"),
        (["text,label", "a,x", "b,y"], DataError, "no examples are left for the test"),
    ],
)
def test_data_without_a_task_is_refused_at_once(
    tiny_model: Path, tmp_path: Path, lines: list[str], error: type[Exception], fragment: str
) -> None:
    data = tmp_path / "data.csv"
    data.write_text("\n".join(lines))
    with pytest.raises(error, match=fragment):
        finetune(tiny_config(tiny_model, data, tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["data.max_length=4000"], "accepted: 2 to 32"),
        (["lora.targets=nothing_like_this"], "lora.targets='nothing_like_this'"),
        (["model=/nonexistent/model"], "/nonexistent/model"),
    ],
)
def test_failures_after_the_start_leave_nothing(
    tiny_model: Path, texts_csv: Path, tmp_path: Path, overrides: list[str], fragment: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        finetune(tiny_config(tiny_model, texts_csv, tmp_path / "run"), overrides, quiet=True)
    assert fragment in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_failure_at_the_very_end_keeps_the_earlier_run(
    tiny_model: Path, texts_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_model, texts_csv, tmp_path / "run", max_steps=1)
    finetune(config, quiet=True)
    before = (tmp_path / "run" / "report.json").read_bytes()

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lora_kernels.training.loss_plot.draw_losses", fail)
    with pytest.raises(OSError, match="disk full"):
        finetune(config, ["seed=5"], quiet=True)
    assert (tmp_path / "run" / "report.json").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_damaged_and_foreign_runs_are_refused(
    tiny_model: Path, texts_csv: Path, tmp_path: Path
) -> None:
    result = finetune(tiny_config(tiny_model, texts_csv, tmp_path / "run", max_steps=1), quiet=True)
    with pytest.raises(AdapterFileError, match="not the folder of a run"):
        Predictor(tmp_path)
    saved = result.adapter / "lora_kernels.json"
    good = json.loads(saved.read_text())

    for broken, fragment in (
        ("{", "cannot be read"),
        ('{"task": "classification"}', "accepted"),
        (json.dumps({**good, "labels": None}), "label names"),
    ):
        saved.write_text(broken)
        with pytest.raises(AdapterFileError, match=fragment):
            Predictor(result.output)

    other = write_model(tmp_path / "wider", hidden=16)
    saved.write_text(json.dumps({**good, "model": str(other)}))
    with pytest.raises(AdapterFileError, match="another model"):
        Predictor(result.output)

    saved.write_text(json.dumps(good))
    weights = result.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AdapterFileError, match="damaged"):
        Predictor(result.output)
    weights.unlink()
    with pytest.raises(AdapterFileError, match=r"adapter_model.safetensors is missing"):
        Predictor(result.output)
