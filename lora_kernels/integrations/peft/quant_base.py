"""The quantized weight under a LoRA layer, as a QuantTensor that shares its memory."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.integrations.peft import gptqmodel_base
from lora_kernels.modules.quant_linear import QuantLinear
from lora_kernels.ops.quant_linear import QuantSpec, QuantTensor

_FOUR_BIT, _EIGHT_BIT = "Linear4bit", "Linear8bitLt"


class QuantBase(NamedTuple):
    """What the op needs of a quantized base layer."""

    q: QuantTensor
    bias: Tensor | None
    compute_dtype: torch.dtype | None


def is_quantized(base: nn.Module) -> bool:
    """A base layer that :func:`quantized_base` may be asked about."""
    return type(base) is QuantLinear or bool(_bitsandbytes(base) or gptqmodel_base.kind_of(base))


def _bitsandbytes(base: nn.Module) -> str:
    """Linear4bit or Linear8bitLt, exactly these classes; else empty. bitsandbytes is not imported:
    who has such a layer has it."""
    cls = type(base)
    if cls.__module__ == "bitsandbytes.nn.modules" and cls.__name__ in (_FOUR_BIT, _EIGHT_BIT):
        return cls.__name__
    return ""


def quantized_base(base: Any) -> tuple[QuantBase | None, str]:
    """(the weight, "") or (None, why the layer has to run its own forward)."""
    if type(base) is QuantLinear:
        return QuantBase(base.quant_weight, base.bias, base.compute_dtype), ""
    kind = _bitsandbytes(base)
    if kind == _FOUR_BIT:
        return _four_bit(base)
    if kind == _EIGHT_BIT:
        return _eight_bit(base)
    if gptqmodel_base.kind_of(base):
        q, reason = gptqmodel_base.quantized_weight(base)
        return (None, reason) if q is None else (QuantBase(q, base.bias, None), "")
    return None, f"base_layer is {type(base).__module__}.{type(base).__qualname__}"


@functools.lru_cache(maxsize=4096)
def _spec(
    fmt: str, layout: str, shape: tuple[int, int], dtype: torch.dtype, block: int, nested: int,
    storage: torch.dtype,
) -> QuantSpec:  # fmt: skip
    return QuantSpec(fmt, layout, shape, dtype, block, nested, False, storage)


def _four_bit(base: Any) -> tuple[QuantBase | None, str]:
    weight, state = base.weight, getattr(base.weight, "quant_state", None)
    if state is None:
        return None, "the weight of base_layer is not quantized yet"
    if getattr(state, "packing_format_for_cpu", False):
        return None, "the weight of base_layer is packed for bitsandbytes' own CPU kernels"
    if state.quant_type not in ("nf4", "fp4") or len(state.shape) != 2:
        return None, f"base_layer has quant_type {state.quant_type} and shape {list(state.shape)}"
    if state.absmax.is_meta or weight.is_meta:
        return None, "the weight of base_layer is on the meta device"
    nested = state.state2
    if nested is not None and nested.blocksize != 256:
        return None, f"base_layer has nested statistics in blocks of {nested.blocksize}"
    stored = weight.data
    count = -(-state.shape[0] * state.shape[1] // 2)
    if stored.numel() * stored.element_size() < count:
        return None, "the weight of base_layer is sharded and not gathered"
    packed = stored.reshape(-1).view(torch.uint8)[:count]
    parts: tuple[Tensor, ...] = (packed, state.absmax, state.code)
    if nested is not None:
        parts = (*parts, nested.absmax, nested.code, state.offset.reshape(()))
    elif state.absmax.dtype != torch.float32:
        return None, f"base_layer has statistics in {state.absmax.dtype}"
    spec = _spec(
        state.quant_type, "flat", tuple(state.shape), state.dtype, state.blocksize,
        0 if nested is None else 256, stored.dtype,
    )  # fmt: skip
    return QuantBase(QuantTensor.unchecked(spec, parts), base.bias, base.compute_dtype), ""


def _eight_bit(base: Any) -> tuple[QuantBase | None, str]:
    weight, state = base.weight, base.state
    if state.has_fp16_weights:
        return None, "base_layer keeps 16-bit weights (has_fp16_weights)"
    scale = state.SCB if getattr(weight, "SCB", None) is None else weight.SCB
    packed = weight.data
    if packed.dtype != torch.int8 or packed.dim() != 2 or scale is None or packed.is_meta:
        return None, "the weight of base_layer is not quantized yet"
    n, k = packed.shape
    spec = _spec("int8", "int8_row", (n, k), torch.float16, max(1, k), 0, torch.int8)
    q = QuantTensor.unchecked(spec, (packed, scale.reshape(n)))
    return QuantBase(q, base.bias, None), ""
