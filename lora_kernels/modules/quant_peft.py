"""PEFT's merging into a QuantLinear, also where ``apply`` has not been called.

PEFT adds an update to ``base_layer.weight.data``. Those are packed bytes here: the sum has no
shape, or, of an int8 weight merged safely, loses the update without a word. So lora.Linear's
`merge` and `unmerge` are sent here for layers over a QuantLinear, and for no others.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from lora_kernels.errors import QuantizedWeightError

_LAYERS = "peft.tuners.lora.layer"


def route_merging() -> None:
    """Sends the merging of PEFT's lora.Linear here; nothing where PEFT is not imported. Called
    again and again: a layer may be made before PEFT is imported."""
    linear = getattr(sys.modules.get(_LAYERS), "Linear", None)
    if linear is None or hasattr(linear.merge, "over_quant_linear"):
        return
    linear.merge = _routed(linear.merge, merge)
    linear.unmerge = _routed(linear.unmerge, unmerge)


def _routed(original: Callable[..., None], ours: Callable[..., None]) -> Callable[..., None]:
    from lora_kernels.modules.quant_linear import QuantLinear

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        call = ours if isinstance(self.get_base_layer(), QuantLinear) else original
        return call(self, *args, **kwargs)

    method.over_quant_linear = True  # type: ignore[attr-defined]
    return method


@torch.no_grad()
def merge(layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """lora.Linear.merge for a QuantLinear base: the sum is quantized again, as PEFT's layers for
    bitsandbytes do. :func:`lora_kernels.merge` says what that costs, PEFT's merging does not.

    Raises:
        QuantizedWeightError: the adapter is of a kind that cannot be added to packed data, or has
            a bias that the layer has no place for. Nothing has been changed then.
        ValueError: NaN or infinity in the sum, with `safe_merge`.
    """
    from peft.tuners.tuners_utils import check_adapters_to_merge

    for adapter in check_adapters_to_merge(layer, adapter_names) or ():
        if adapter in layer.lora_A:
            _add(layer, adapter, 1.0, safe_merge)
            layer.merged_adapters.append(adapter)


@torch.no_grad()
def unmerge(layer: Any) -> None:
    """lora.Linear.unmerge, likewise."""
    while layer.merged_adapters:
        adapter = layer.merged_adapters.pop()
        if adapter in layer.lora_A:
            _add(layer, adapter, -1.0, False)


def _add(layer: Any, adapter: str, sign: float, safe: bool) -> None:
    from lora_kernels.modules.quant_linear import quantize_like

    base = layer.get_base_layer()
    if adapter in layer.lora_variant:
        kind = type(layer.lora_variant[adapter]).__name__
        raise QuantizedWeightError(
            f"adapter {adapter!r} ({kind}) cannot be merged into a quantized weight; plain LoRA can"
        )
    bias = layer.lora_B[adapter].bias
    if bias is not None and base.bias is None:
        raise QuantizedWeightError(
            f"adapter {adapter!r} has a bias (lora_bias=True), the quantized layer has none to "
            "merge it into"
        )
    warnings.warn(
        "merging into a quantized weight rounds it again, which can lose the adapter", stacklevel=4
    )
    q = base.quant_weight
    merged = q.dequantize(torch.float32) + sign * layer.get_delta_weight(adapter).float()
    if safe and not bool(torch.isfinite(merged).all()):
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken"
        )
    base._adopt(quantize_like(merged, base.spec, "the merged weight").to(base.spec.dtype))
    if bias is not None:
        base.bias.data += sign * layer.scaling[adapter] * bias
