"""Base models whose files are quantized already, read without the packages that wrote them.

Method qlora adds its adapters to the layers as they are, method lora through PEFT.
"""

from __future__ import annotations

from typing import Any

from lora_kernels.errors import ConfigError
from lora_kernels.modules.quant_hints import METHODS
from lora_kernels.training.config import Config

_TRAINED_BY = ("lora", "qlora")
_QUANT_KEYS = ("format", "block_size", "double_quant")


def method_of(stored: Any) -> str | None:
    """Who quantized the weights, of those that are read here; None for any other model.

    Args:
        stored: the model's configuration, of transformers.
    """
    found = getattr(stored, "quantization_config", None)
    if found is None:
        return None
    if not isinstance(found, dict):
        found = found.to_dict()
    method = found.get("quant_method")
    method = getattr(method, "value", method)
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"
    return method if method in METHODS else None


def reading_options(stored: Any) -> dict[str, Any]:
    """Keywords of ``from_pretrained`` for a model with this configuration."""
    if method_of(stored) is None:
        return {}
    import lora_kernels as lk

    return {"quantization_config": lk.QuantConfig()}


def check_training(config: Config, stored: Any) -> None:
    """Refuses what a quantized model cannot honour, before its weights are read.

    Raises:
        ConfigError: a method that trains the weights, or another format than theirs.
    """
    quantized = method_of(stored)
    if quantized is None:
        return
    if config.method not in _TRAINED_BY:
        raise ConfigError(
            f"method={config.method!r}, but the model is quantized already ({quantized}) and its "
            f"weights stay as they are; accepted: {', '.join(_TRAINED_BY)}"
        )
    if config.method != "qlora":
        return
    for key in _QUANT_KEYS:
        given = getattr(config.quant, key)
        if given is not None:
            raise ConfigError(
                f"quant.{key}={given!r}, but the model is quantized already ({quantized}) and "
                "keeps its format; leave it out"
            )
