"""Several processes on one job: who writes, and whether they share the work as was asked.

torchrun and accelerate launch start one process per device and tell each its place by environment
variables. transformers.Trainer does the rest; every process runs the same code.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_kernels.errors import ConfigError
from lora_kernels.training.atomic import staged_folder


def rank() -> int:
    """This process's number among all, 0 without a launcher."""
    return _number("RANK")


def world_size() -> int:
    """How many processes the launcher started."""
    return max(_number("WORLD_SIZE"), 1)


def is_main() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def _number(variable: str) -> int:
    text = os.environ.get(variable, "") or "0"
    if not text.isdigit():
        raise ConfigError(f"{variable}={text!r}; accepted: a number, as torchrun sets it")
    return int(text)


@contextmanager
def output_stage(target: Path) -> Iterator[Path]:
    """The main process's :func:`staged_folder`; a folder that is thrown away for the others."""
    if is_main():
        with staged_folder(target) as stage:
            yield stage
    else:
        with tempfile.TemporaryDirectory(prefix="lora-kernels-rank-") as folder:
            yield Path(folder)


def check_launcher() -> None:
    """Refuses what a launcher asks for and this installation lacks.

    Raises:
        ConfigError: DeepSpeed without its package.
    """
    if _flag("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "ACCELERATE_USE_DEEPSPEED is set and deepspeed is not installed; pip install "
            "deepspeed, or shard by FSDP2 (accelerate launch --use_fsdp --fsdp_version 2)"
        )


def check_strategy(accelerator: Any, args: Any) -> None:
    """Refuses a run that was asked to shard and would not: accelerate drops FSDP without a word
    where it does not support the device.

    Args:
        accelerator: the Trainer's.
        args: its TrainingArguments.

    Raises:
        ConfigError: says what runs instead and what to do.
    """
    used = str(accelerator.distributed_type).rpartition(".")[2]
    asked = {
        "FSDP": bool(getattr(args, "fsdp", None)) or _flag("ACCELERATE_USE_FSDP"),
        "DEEPSPEED": bool(getattr(args, "deepspeed", None)) or _flag("ACCELERATE_USE_DEEPSPEED"),
    }
    for strategy, wanted in asked.items():
        if wanted and used != strategy:
            instead = {"NO": "one process", "MULTI_CPU": "DDP on the CPU"}.get(used, used)
            raise ConfigError(
                f"{strategy} was asked for, but accelerate would run {instead}: it shards over "
                "several GPUs only; leave the strategy out, or start one process per GPU"
            )


def save_trained(trainer: Any, save: Callable[[Any, Path], object], folder: Path) -> None:
    """Writes what trained into `folder`; every process calls it.

    Args:
        save: writes an unwrapped model; called by the main process alone. A sharded model is
            gathered by all of them and written by the Trainer instead.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.save_model(str(folder))
    elif trainer.is_world_process_zero():
        save(trainer.accelerator.unwrap_model(trainer.model), folder)


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")
