"""What the packed copies of a model's frozen weights will take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lora_kernels.integrations.peft.quant_base import is_quantized
from lora_kernels.ops import explain
from lora_kernels.ops.lora_linear import pack_policy

_COPIES = 2  # for the forward, and for the gradient of x


def packed_bytes_of(layers: Iterable[tuple[Any, str]]) -> int:
    """Bytes that training will keep for these LoRA layers beside their weights, before padding;
    (layer, backend of a call of it). Copies that find no room are not kept."""
    if pack_policy() == "never":
        return 0
    found: dict[tuple[int, ...], int] = {}
    for layer, backend in layers:
        base = layer.get_base_layer()
        if is_quantized(base) or base.weight.is_meta:
            continue
        weight = base.weight
        if backend == "cpu" or (_drops(layer) and _backend_with_dropout(layer) == "cpu"):
            key = (weight.data_ptr(), *weight.stride())
            found[key] = _COPIES * weight.numel() * weight.element_size()
    return sum(found.values())


def _drops(layer: Any) -> bool:
    dropouts: Iterable[nn.Module] = layer.lora_dropout.values()
    return any(isinstance(d, nn.Dropout) and d.p > 0.0 for d in dropouts)


def _backend_with_dropout(layer: Any) -> str:
    weight = layer.get_base_layer().weight
    told = explain(
        "lora_linear", M=1024, K=layer.in_features, N=layer.out_features,
        rank=max(layer.r.values()), dtype=weight.dtype, weight_dtype=weight.dtype,
        device=weight.device.type, dropout_p=0.1,
    )  # fmt: skip
    return str(told["backend"])
