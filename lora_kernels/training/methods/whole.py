"""Method full: everything trains, and a whole model is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kernels.training.config import Config
from lora_kernels.training.loading import Base
from lora_kernels.training.tasks import Task

NEEDED_FILES = ("config.json", "model.safetensors")


def prepare(base: Base, task: Task, config: Config) -> Any:
    """The model itself; its weights are fp32 unless the precision is ``bf16-weights``."""
    base.model.requires_grad_(True)
    return base.model


def save(model: Any, folder: Path) -> None:
    """transformers' format, in one file: ``from_pretrained`` loads it."""
    model.save_pretrained(str(folder), max_shard_size="1000GB")


def attach(base: Base, folder: Path, saved: dict[str, Any]) -> Any:
    """`base` was loaded from `folder` already."""
    return base.model
