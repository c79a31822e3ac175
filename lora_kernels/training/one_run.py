"""One training from the seed: model, what of it trains, Trainer, metrics before and after."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from lora_kernels.errors import DataError
from lora_kernels.training.arguments import keeps_best, training_arguments, writes_checkpoints
from lora_kernels.training.callbacks import Progress, WarmUp
from lora_kernels.training.config import Config
from lora_kernels.training.config_checks import PEFT_METHODS
from lora_kernels.training.gguf_folder import model_folder
from lora_kernels.training.interruption import StopOnSignal
from lora_kernels.training.loading import load_base, load_options, load_tokenizer
from lora_kernels.training.memory import peak_memory
from lora_kernels.training.methods import method_module
from lora_kernels.training.precision import base_dtype, check_device
from lora_kernels.training.preflight import check_room, checkpoint_bytes
from lora_kernels.training.processes import save_trained
from lora_kernels.training.references import model_path
from lora_kernels.training.tasks import Task
from lora_kernels.training.trackers import (
    JsonLog,
    StopAtNaN,
    finish_trackers,
    start_trackers,
    tensorboard,
)
from lora_kernels.training.trainer import GeneratingTrainer, LoRATrainer
from lora_kernels.training.turns import Turns

Curve = list[tuple[int, float]]


@dataclass
class Run:
    """What one training gave. Losses are (step, value) pairs."""

    before: float | None
    after: float
    metrics: dict[str, float]
    losses: Curve
    validation_losses: Curve
    step_seconds: list[float]
    layers: list[dict[str, Any]] = field(default_factory=list)
    metrics_before: dict[str, float] | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    steps: int = 0
    examples_seen: int = 0
    tokens_seen: int = 0
    trained: int = 0
    parameters: int = 0
    peak_memory: dict[str, Any] = field(default_factory=dict)
    stopped_early: bool = False
    best_step: int | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds)


def train_once(
    config: Config,
    task: Task,
    precision: str,
    *,
    kernels: bool,
    folder: Path,
    save_to: Path | None,
    quiet: bool,
    turns: Turns | None = None,
    resume_from: Path | None = None,
) -> Run:
    """Trains from the seed; two calls of a comparison differ in `kernels` and `save_to` only.

    Args:
        folder: the Trainer's own, for checkpoints.
        save_to: where the adapter goes, logs beside it; None keeps nothing and skips the metrics
            before training.
        turns: shares the machine with another run, step by step.
        resume_from: a checkpoint.

    Raises:
        ConfigError: model, method or room on the disk do not fit the configuration.
        TrainingInterruptedError: a signal stopped the training.
    """
    transformers.set_seed(config.seed)
    device = check_device(config.device)
    path = model_folder(model_path("model", config.model))
    tokenizer = load_tokenizer(path)
    dtype = base_dtype(precision, config.method)
    base = load_base(task, path, dtype, tokenizer, load_options(config, path))
    caches = getattr(base.model.config, "use_cache", None)
    base.model.config.use_cache = False  # a cache hides from the model where packed texts begin
    known = len(task.notes)
    task.prepare(base.model.to(device), tokenizer)
    method = method_module(config.method)
    model = method.prepare(base, task, config)
    if save_to is not None:
        _check_disk(config, model, folder)
    # Lists of examples serve as datasets; the Trainer's annotations know only torch's class.
    sets: dict[str, Any] = {
        name: task.dataset(name, tokenizer) for name in ("train", "validation", "test")
    }
    if not sets["train"] or not sets["test"]:
        raise DataError(f"{config.data.path}: no example is left after cutting to data.max_length")
    if keeps_best(config) and not sets["validation"]:
        raise DataError(
            f"{config.data.path}: no validation example is left after cutting to data.max_length; "
            "train.keep_best and train.early_stopping need some"
        )
    if not quiet:
        _tell(task.notes[known:])
    collator = task.collator(tokenizer, base.model)
    trainer = (GeneratingTrainer if task.generates else LoRATrainer)(
        model=model,
        args=training_arguments(
            config, task, precision, device, folder, evaluate=bool(sets["validation"])
        ),
        train_dataset=sets["train"],
        eval_dataset=sets["validation"] or None,
        data_collator=collator,
        processing_class=tokenizer if task.generates else None,
        preprocess_logits_for_metrics=task.reduce_logits(),
        callbacks=[turns] if turns else None,  # before the clock, so that waiting is not timed
        kernels=kernels and config.method in PEFT_METHODS,
        loraplus_ratio=config.train.loraplus_ratio,
    )
    trainer.compute_metrics = _scorer(task, trainer)
    start_trackers(trainer)
    stop = StopOnSignal()
    _add_callbacks(trainer, config, sets, collator, save_to, stop)
    if not quiet:
        trainer.add_callback(Progress("both runs in turns" if turns else "training"))

    before = _evaluate(trainer, task, sets["test"]) if save_to else None
    listen = writes_checkpoints(config)
    if listen:
        with stop.listening():
            trainer.train(resume_from_checkpoint=resume_from)
        stop.check(folder, trainer.state)
    else:
        trainer.train()
    metrics = _evaluate(trainer, task, sets["test"])
    finish_trackers(trainer)
    if caches is not None:
        base.model.config.use_cache = caches
    if save_to is not None:
        save_trained(trainer, method.save, save_to)
        if config.method == "full" and trainer.is_world_process_zero():
            tokenizer.save_pretrained(str(save_to))  # a whole model can be the base of another run
    history: list[dict[str, Any]] = trainer.state.log_history
    examples, tokens = trainer.seen
    return Run(
        before=before[task.metric] if before else None,
        after=metrics[task.metric],
        metrics=metrics,
        metrics_before=before,
        losses=_curve(history, "loss"),
        validation_losses=_curve(history, "eval_loss"),
        curves={name: c for name in task.metrics if (c := _curve(history, f"eval_{name}"))},
        step_seconds=trainer.step_seconds,
        layers=trainer.kernel_report.to_dict()["layers"] if trainer.kernel_report else base.layers,
        steps=trainer.state.global_step,
        examples_seen=examples,
        tokens_seen=tokens,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in model.parameters()),
        peak_memory=peak_memory(device),
        stopped_early=trainer.state.global_step < trainer.state.max_steps,
        best_step=_best_step(trainer) if keeps_best(config) else None,
        details=dict(task.details),
    )


def _check_disk(config: Config, model: Any, folder: Path) -> None:
    """Room for what trained, and for the checkpoints before it."""
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    check_room("output", Path(config.output).expanduser(), size)
    if writes_checkpoints(config):
        copies = config.train.save_total_limit or 2
        whole = config.method not in PEFT_METHODS
        check_room("output", folder, size + copies * checkpoint_bytes(model.parameters(), whole))


def _scorer(task: Task, trainer: LoRATrainer) -> Callable[[Any], dict[str, float]]:
    return lambda prediction: task.compute_metrics(prediction, trainer.evaluated)


def _add_callbacks(
    trainer: LoRATrainer,
    config: Config,
    sets: dict[str, Any],
    collator: Any,
    save_to: Path | None,
    stop: StopOnSignal,
) -> None:
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(WarmUp(collator(sets["train"][: config.train.batch_size])))
    trainer.add_callback(StopAtNaN())
    trainer.add_callback(stop)
    if config.train.early_stopping is not None:
        trainer.add_callback(transformers.EarlyStoppingCallback(config.train.early_stopping))
    if save_to is not None:
        trainer.add_callback(JsonLog(save_to.parent / "log.jsonl"))
        if "tensorboard" in config.trackers:
            trainer.add_callback(tensorboard(save_to.parent / "tensorboard"))


def _evaluate(trainer: LoRATrainer, task: Task, features: Any) -> dict[str, float]:
    """Metrics of the test without their prefix.

    Raises:
        DataError: the metric that counts is not defined on these data.
    """
    found = trainer.evaluate(features, metric_key_prefix="test")
    metrics = {k.removeprefix("test_"): v for k, v in found.items() if k.startswith("test_")}
    if task.metric not in metrics:
        raise DataError(
            f"metric={task.metric!r} is not defined on the test data (one class is all there is); "
            "give more test data or another metric"
        )
    return metrics


def _curve(history: list[dict[str, Any]], key: str) -> Curve:
    return [(entry["step"], entry[key]) for entry in history if key in entry]


def _best_step(trainer: LoRATrainer) -> int | None:
    best = trainer.state.best_model_checkpoint
    return int(best.rpartition("-")[2]) if best else None


def _tell(lines: list[str]) -> None:
    from tqdm.auto import tqdm

    for line in lines:
        tqdm.write(line, file=sys.stderr)
