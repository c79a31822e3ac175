"""What the quantization_config of a checkpoint means for the layout of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from lora_kernels.errors import QuantizedWeightError
from lora_kernels.ops.quant_linear import Hints

METHODS = ("bitsandbytes", "gptq", "awq", "fp8", "lora_kernels")
_FLOATS = {str(d).removeprefix("torch."): d
           for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}  # fmt: skip


def _refuse(key: str, value: object, accepted: str) -> NoReturn:
    raise QuantizedWeightError(f"quantization_config: {key}={value!r}; accepted: {accepted}")


def read_dtype(value: object) -> torch.dtype | None:
    """A dtype as configurations write it (``bfloat16``, ``torch.bfloat16``); None if it is none."""
    if isinstance(value, torch.dtype):
        return value
    return _FLOATS.get(str(value).removeprefix("torch."))


def hints_from_config(config: Mapping[str, Any], dtype: torch.dtype | None = None) -> Hints:
    """Hints from a model's quantization_config.

    Args:
        config: as in config.json; an empty one gives no hints.
        dtype: of the model.

    Raises:
        QuantizedWeightError: a method, width, version or group size that cannot be read here; the
            message names the key.
    """
    if not config:
        return Hints(dtype)
    method = config.get("quant_method")
    method = getattr(method, "value", method)
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in METHODS:
        _refuse("quant_method", method, ", ".join(METHODS))
    if method in ("gptq", "awq"):
        bits = config.get("bits", config.get("w_bit", 4))
        if bits != 4:
            _refuse("bits", bits, "4")
        size = config.get("group_size", config.get("q_group_size", 128))
        if type(size) is not int or (size < 1 and size != -1):
            _refuse("group_size", size, "-1 or an integer >= 1")
        version = _gptq_layout(config) if method == "gptq" else _awq_layout(config)
        return Hints(dtype, version, 4, size)
    if method == "fp8":
        block = config.get("weight_block_size")
        if block is None:
            return Hints(dtype)
        square = isinstance(block, (list, tuple)) and len(block) == 2 and block[0] == block[1]
        if not square or type(block[0]) is not int or block[0] < 1:
            _refuse("weight_block_size", block, "two equal integers >= 1")
        return Hints(dtype, block_size=block[0])
    return Hints(dtype)


def _gptq_layout(config: Mapping[str, Any]) -> str:
    if config.get("is_marlin_format"):
        _refuse("is_marlin_format", True, "False")
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        _refuse("checkpoint_format", version, "gptq, gptq_v2")
    return "gptq_v1" if version == "gptq" else "gptq"


def _awq_layout(config: Mapping[str, Any]) -> str:
    for key in ("version", "format", "checkpoint_format"):
        version = str(config.get(key) or "gemm").lower()
        if version != "gemm":
            _refuse(key, version, "gemm")
    return "awq"
