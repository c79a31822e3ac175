"""One training from the seed: model, adapter, Trainer, metrics before and after."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers

from lora_kernels.errors import ConfigError, LoraKernelsError
from lora_kernels.training.callbacks import Progress, WarmUp
from lora_kernels.training.config import Config
from lora_kernels.training.precision import base_dtype
from lora_kernels.training.references import model_path
from lora_kernels.training.tasks import Task
from lora_kernels.training.trainer import LoRATrainer
from lora_kernels.training.turns import Turns


@dataclass
class Run:
    """What one training gave. Losses are (step, value) pairs."""

    before: float | None
    after: float
    metrics: dict[str, float]
    losses: list[tuple[int, float]]
    validation_losses: list[tuple[int, float]]
    step_seconds: list[float]
    layers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds)


def load_tokenizer(path: str) -> Any:
    """The model's tokenizer, with a padding token.

    Raises:
        ConfigError: `path` holds none.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as e:
        raise ConfigError(f"model={path!r}: no tokenizer can be loaded: {_first_line(e)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    task: Task, path: str, precision: str, tokenizer: Any, options: dict[str, Any]
) -> Any:
    """The base model with the head of the task, in the dtype of the precision.

    Args:
        options: further keywords of ``from_pretrained``.

    Raises:
        ConfigError: `path` is no model that has such a head.
    """
    try:
        model = task.load_model(path, base_dtype(precision), options)
    except LoraKernelsError:
        raise
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"model={path!r} cannot be loaded: {_first_line(e)}") from None
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def load_options(config: Config, path: str) -> dict[str, Any]:
    """What the configuration says about the base model, as keywords of ``from_pretrained``."""
    options: dict[str, Any] = {}
    if config.attention != "auto":
        options["attn_implementation"] = config.attention
    rate = config.train.base_dropout
    if rate is not None:
        # Families of models call it hidden_dropout_prob, attention_dropout, resid_pdrop, ...
        stored = transformers.AutoConfig.from_pretrained(path).to_dict()
        options |= {k: rate for k, v in stored.items() if "drop" in k and type(v) in (int, float)}
    return options


def add_adapter(model: Any, task: Task, config: Config) -> Any:
    """A PEFT model. Whatever trains is fp32, as optimizer steps are lost in bf16.

    Raises:
        ConfigError: lora.targets match nothing.
    """
    import peft

    lora = config.lora
    adapter = peft.LoraConfig(
        task_type=task.peft_task,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=lora.targets,
    )
    try:
        model = peft.get_peft_model(model, adapter)
    except ValueError as e:
        raise ConfigError(f"lora.targets={lora.targets!r}: {_first_line(e)}") from None
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


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
) -> Run:
    """Trains from the seed; two calls of a comparison differ in `kernels` and `save_to` only.

    Args:
        folder: the Trainer's own; nothing is left in it.
        save_to: where the adapter goes; None keeps nothing and skips the metric before training.
        turns: shares the machine with another run, step by step.
    """
    transformers.set_seed(config.seed)
    path = model_path("model", config.model)
    tokenizer = load_tokenizer(path)
    base = load_base(task, path, precision, tokenizer, load_options(config, path))
    model = add_adapter(base, task, config)
    # Lists of examples serve as datasets; the Trainer's annotations know only torch's class.
    sets: dict[str, Any] = {
        name: task.dataset(name, tokenizer) for name in ("train", "validation", "test")
    }
    collator = task.collator(tokenizer)
    trainer = LoRATrainer(
        model=model,
        args=_arguments(config, precision, folder, evaluate=bool(sets["validation"])),
        train_dataset=sets["train"],
        eval_dataset=sets["validation"] or None,
        data_collator=collator,
        compute_metrics=task.compute_metrics,
        callbacks=[turns] if turns else None,  # before the clock, so that waiting is not timed
        kernels=kernels,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(WarmUp(collator(sets["train"][: config.train.batch_size])))
    if not quiet:
        trainer.add_callback(Progress("both runs in turns" if turns else "training"))

    key = f"test_{task.metric}"
    before = trainer.evaluate(sets["test"], metric_key_prefix="test")[key] if save_to else None
    trainer.train()
    metrics = trainer.evaluate(sets["test"], metric_key_prefix="test")
    if save_to is not None:
        model.save_pretrained(str(save_to))
    history: list[dict[str, Any]] = trainer.state.log_history
    return Run(
        before=before,
        after=metrics[key],
        metrics={k.removeprefix("test_"): v for k, v in metrics.items() if k.startswith("test_")},
        losses=[(e["step"], e["loss"]) for e in history if "loss" in e],
        validation_losses=[(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e],
        step_seconds=trainer.step_seconds,
        layers=trainer.kernel_report.to_dict()["layers"] if trainer.kernel_report else [],
    )


def _arguments(
    config: Config, precision: str, folder: Path, evaluate: bool
) -> transformers.TrainingArguments:
    train = config.train
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": config.seed,
        "data_seed": config.seed,
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps,
        "per_device_train_batch_size": train.batch_size,
        "per_device_eval_batch_size": train.eval_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "lr_scheduler_type": train.scheduler,
        "warmup_steps": train.lr_warmup,
        "bf16": precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "eval_strategy": "epoch" if evaluate else "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if train.checkpointing:
        known = {f.name for f in fields(transformers.TrainingArguments)}
        # The older name of the switch goes away in transformers 6.
        names = ("activation_checkpointing", "gradient_checkpointing")
        arguments[next(name for name in names if name in known)] = True
    return transformers.TrainingArguments(**arguments)


def _first_line(error: Exception) -> str:
    """Other libraries' messages run over many lines; ours is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
