"""Fine-tuning on top of transformers.Trainer, PEFT and torchmetrics (extra ``[train]``).

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Config": "lora_kernels.training.config",
    "LoRATrainer": "lora_kernels.training.trainer",
    "Predictor": "lora_kernels.training.predictor",
    "Result": "lora_kernels.training.result",
    "finetune": "lora_kernels.training.finetuning",
    "read_config": "lora_kernels.training.config_reader",
}

__all__ = ["Config", "LoRATrainer", "Predictor", "Result", "finetune", "read_config"]

if TYPE_CHECKING:
    from lora_kernels.training.config import Config as Config
    from lora_kernels.training.config_reader import read_config as read_config
    from lora_kernels.training.finetuning import finetune as finetune
    from lora_kernels.training.predictor import Predictor as Predictor
    from lora_kernels.training.result import Result as Result
    from lora_kernels.training.trainer import LoRATrainer as LoRATrainer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lora_kernels.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
