"""A configuration in the words of transformers.TrainingArguments."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import transformers

from lora_kernels.training.config import Config
from lora_kernels.training.tasks import Task

_EVAL_BATCH = 64


def keeps_best(config: Config) -> bool:
    """Whether the run ends with its best checkpoint."""
    return config.train.keep_best or config.train.early_stopping is not None


def writes_checkpoints(config: Config) -> bool:
    return config.train.save_steps is not None or keeps_best(config)


def eval_batch_size(config: Config, task: Task) -> int:
    """The configured size; a language model's logits are too large for big batches."""
    if config.train.eval_batch_size is not None:
        return config.train.eval_batch_size
    small = task.language_model or task.generates
    return config.train.batch_size if small else max(_EVAL_BATCH, config.train.batch_size)


def training_arguments(
    config: Config, task: Task, precision: str, device: str, folder: Path, evaluate: bool
) -> transformers.TrainingArguments:
    """What the Trainer is told.

    Args:
        precision: as resolved.
        device: ``cpu`` or ``cuda``.
        folder: for checkpoints.
        evaluate: there are validation data.
    """
    train = config.train
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": config.seed,
        "data_seed": config.seed,
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps,
        "per_device_train_batch_size": train.batch_size,
        "per_device_eval_batch_size": eval_batch_size(config, task),
        "gradient_accumulation_steps": train.gradient_accumulation,
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "lr_scheduler_type": train.scheduler,
        "warmup_steps": train.lr_warmup,
        "label_smoothing_factor": train.label_smoothing,
        "bf16": precision == "bf16",
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device == "cuda",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": [name for name in config.trackers if name not in ("jsonl", "tensorboard")],
        "run_name": Path(config.output).name,
        "disable_tqdm": True,
        "label_names": task.label_names,
        **_schedule(config, task, evaluate),
    }
    if train.checkpointing:
        known = {f.name for f in fields(transformers.TrainingArguments)}
        # The older name of the switch goes away in transformers 6.
        names = ("activation_checkpointing", "gradient_checkpointing")
        arguments[next(name for name in names if name in known)] = True
    if not task.generates:
        return transformers.TrainingArguments(**arguments)
    return transformers.Seq2SeqTrainingArguments(**arguments, predict_with_generate=True)


def _schedule(config: Config, task: Task, evaluate: bool) -> dict[str, Any]:
    """When to validate and when to save."""
    train = config.train
    schedule: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no"}
    if evaluate:
        schedule["eval_strategy"] = "epoch" if train.eval_steps is None else "steps"
        schedule["eval_steps"] = train.eval_steps
    if keeps_best(config):
        schedule |= {
            "save_strategy": schedule["eval_strategy"],
            "save_steps": train.save_steps or train.eval_steps or 500,
            "load_best_model_at_end": True,
            "metric_for_best_model": task.metric,
            "greater_is_better": task.more_is_better,
            "save_total_limit": train.save_total_limit or (None if train.save_steps else 1),
        }
    elif train.save_steps is not None:
        schedule |= {
            "save_strategy": "steps",
            "save_steps": train.save_steps,
            "save_total_limit": train.save_total_limit,
        }
    return schedule
