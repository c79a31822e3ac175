"""Method qlora: the frozen weights are quantized, adapters and head train in fp32."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import lora_kernels as lk
from lora_kernels.errors import AdapterFileError, ConfigError, InvalidArgumentError
from lora_kernels.training.config import Config
from lora_kernels.training.loading import Base
from lora_kernels.training.methods.module_names import (
    check_rank,
    check_targets,
    fresh_modules,
    head_names,
)
from lora_kernels.training.methods.wide_parameters import widen_trained
from lora_kernels.training.tasks import Task

NEEDED_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass
class Quantization:
    """What :func:`lora_kernels.replace_modules` takes as `quant`; None: the format's own."""

    format: str | None
    block_size: int | None
    double_quant: bool | None
    quant_storage: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None


def prepare(base: Base, task: Task, config: Config) -> Any:
    """Quantizes the layers that get an adapter, in place.

    Raises:
        ConfigError: targets match nothing, the rank is larger than a layer, or the format cannot
            be used.
    """
    lora, model = config.lora, base.model
    check_targets(model, lora.targets)
    for name in lora.modules_to_save:
        check_targets(model, [name], "lora.modules_to_save")
    wide = config.precision != "bf16-weights"
    base.layers = _replace(base, asdict(lora), asdict(config.quant), wide)
    if config.train.checkpointing:
        # Frozen embeddings give inputs without gradients, which a recomputed layer would not pass.
        model.enable_input_require_grads()
    return model


def _replace(
    base: Base, lora: dict[str, Any], quant: dict[str, Any], wide: bool
) -> list[dict[str, Any]]:
    """The layers that now carry an adapter, as the report of `replace_modules` has them."""
    model = base.model
    saved = [*lora["modules_to_save"], *head_names(model), *fresh_modules(model, base.fresh)]
    try:
        report = lk.replace_modules(
            model, lora["r"], lora["alpha"], lora["targets"], lora["dropout"],
            Quantization(quant["format"], quant["block_size"], quant["double_quant"]),
            rslora=lora["rslora"], exclude=lora["exclude"],
            modules_to_save=list(dict.fromkeys(saved)),
            adapter_dtype=torch.float32 if wide else torch.bfloat16,
        )  # fmt: skip
    except InvalidArgumentError as e:
        raise ConfigError(f"method=qlora: {e}") from None
    check_rank(model, lora["r"])
    if wide:
        widen_trained(model)
    return [layer for layer in report.to_dict()["layers"] if layer["status"] == "fused"]


def save(model: Any, folder: Path) -> None:
    """The adapter and the head in PEFT's format; the quantized weights stay with the base."""
    lk.save_adapter(model, folder)


def attach(base: Base, folder: Path, saved: dict[str, Any]) -> Any:
    """Quantizes the base as in training and reads adapter and head.

    Raises:
        AdapterFileError: the file is damaged or belongs to another model.
    """
    if not isinstance(saved.get("lora"), dict) or not isinstance(saved.get("quant"), dict):
        raise AdapterFileError(f"{folder}: lora_kernels.json lacks lora and quant; train again")
    try:
        _replace(base, saved["lora"], saved["quant"], saved["precision"] != "bf16-weights")
    except (KeyError, TypeError) as e:
        raise AdapterFileError(f"{folder}: lora_kernels.json lacks {e}; train again") from None
    lk.load_adapter(base.model, folder)
    return base.model
