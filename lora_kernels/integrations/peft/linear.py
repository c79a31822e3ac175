"""PEFT's LoRA linear with one fused op in place of three linears, a product and a sum."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS, Linear, LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_kernels.integrations.peft import call_plan, eligibility, quant_linear
from lora_kernels.integrations.peft.eligibility import Parts, parts_of
from lora_kernels.integrations.peft.fallback import call_falls_back
from lora_kernels.integrations.peft.quant_base import is_quantized
from lora_kernels.modules import quant_peft
from lora_kernels.modules.layer_group import (
    AnyOperands,
    DoraOperands,
    Operands,
    QuantOperands,
    group_of,
)
from lora_kernels.ops import dora_linear, lora_linear

# Keywords that PEFT's hooks add. The offsets of activated LoRA concern adapters that are variants,
# and these are never fused.
_NEUTRAL = ("adapter_names", *VARIANT_KWARG_KEYS)


class FusedLoraLinear(Linear):
    """``peft.tuners.lora.layer.Linear`` with another forward, and a line in its repr that says so.

    Adds no state: modules become this class and return by assignment of ``__class__``, and state
    dicts, checkpoints, merging and adapter management are PEFT's. Everything that forward depends
    on (active adapter, scaling, dropout, hooks, dtypes) is read on every call.
    """

    fused_by_lora_kernels = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x ``[..., in_features]`` -> ``[..., out_features]``, in the dtype PEFT would give.

        Calls that the op does not cover run PEFT's forward, after one warning per reason.

        Raises:
            StrictFallbackError: such a call under ``LORA_KERNELS_STRICT=1``.
        """
        y = grouped_or_fused(self, x, args, kwargs)
        # Not super(): see conversion._swap.
        return Linear.forward(self, x, *args, **kwargs) if y is None else y

    def _get_name(self) -> str:
        return Linear.__name__  # printed as lora.Linear, which callers may look for

    def extra_repr(self) -> str:
        return "forward fused by lora_kernels"


class FusedQuantLoraLinear(FusedLoraLinear):
    """The same over a QuantLinear, whose packed weight PEFT's own merging cannot add to."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT; the sum is quantized again."""
        quant_peft.merge(self, safe_merge, adapter_names)

    def unmerge(self) -> None:
        """As PEFT, likewise."""
        quant_peft.unmerge(self)


def grouped_or_fused(
    layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The result from the layer's group, or :func:`fused_call`."""
    group = group_of(layer)
    y = None if group is None or args or kwargs else group.call(layer, x)
    return fused_call(layer, x, args, kwargs) if y is None else y


def fused_call(
    layer: LoraLayer, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The result of a call that can be fused; None when the layer has to run its own forward."""
    if not args and not kwargs:
        operands = call_plan.planned(layer, x)
        if operands is not None:
            return _of(x, operands)
    adapter, reason = _adapter_of_call(layer, args, kwargs)
    if adapter:
        parts = parts_of(layer, adapter)
        reason = eligibility.layer_reason(layer, adapter, parts) or eligibility.mode_reason()
        if not reason and is_quantized(parts.base):
            base, reason = quant_linear.prepared(layer, parts, x)
            if base is not None:
                return quant_linear.fused(x, parts, base, layer.scaling[adapter])
        elif not reason:
            magnitude = eligibility.magnitude_of(layer, adapter)
            named = eligibility.named_parameters(parts, magnitude)
            reason = eligibility.tensor_reason(layer, x, named)
            if not reason:
                return _fused(layer, x, adapter, parts, magnitude)
    if reason:
        call_falls_back(reason)
    return None


def _adapter_of_call(
    layer: LoraLayer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, str]:
    """(adapter to consider, reason not to); both empty when only the base layer has to run."""
    if layer.disable_adapters or layer.merged:
        return "", ""
    if kwargs.get("adapter_names") is not None:
        return "", "a mixed batch names an adapter per sample (adapter_names)"
    if args or any(key not in _NEUTRAL for key in kwargs):
        return "", "the call has arguments beside the input"
    here = layer.lora_A
    names = [name for name in layer.active_adapters if name in here]
    if len(names) > 1:
        return "", "several adapters are active"
    return names[0] if names else "", ""


def operands(layer: LoraLayer, x: Tensor) -> AnyOperands | None:
    """What a grouped call needs of `layer` for x; None when its call has to be its own."""
    planned = call_plan.planned(layer, x)
    if planned is not None:
        return planned
    adapter, _ = _adapter_of_call(layer, (), {})
    if not adapter:
        return None
    parts = parts_of(layer, adapter)
    if is_quantized(parts.base):
        return _quant_operands(layer, adapter, parts, x)
    if eligibility.layer_reason(layer, adapter, parts) or eligibility.mode_reason():
        return None
    magnitude = eligibility.magnitude_of(layer, adapter)
    if eligibility.tensor_reason(layer, x, eligibility.named_parameters(parts, magnitude)):
        return None
    found = _operands(parts, layer.scaling[adapter])
    if magnitude is None:
        call_plan.keep(layer, adapter, parts, found)
        return found
    weight, lora_a, lora_b, scaling, bias, dropout_p = found
    if dropout_p > 0.0 or weight.requires_grad or torch.compiler.is_compiling():
        return None
    assert lora_a is not None and lora_b is not None
    return DoraOperands(weight, lora_a, lora_b, magnitude.weight, scaling, bias)


def _quant_operands(
    layer: LoraLayer, adapter: str, parts: Parts, x: Tensor
) -> QuantOperands | None:
    if torch.compiler.is_compiling() or adapter in layer.lora_variant:
        return None
    if eligibility.layer_reason(layer, adapter, parts) or eligibility.mode_reason():
        return None
    base, _ = quant_linear.prepared(layer, parts, x)
    return None if base is None else quant_linear.operands(parts, base, layer.scaling[adapter])


def _operands(parts: Parts, scaling: float) -> Operands:
    base, lora_a, lora_b, dropout = parts
    weight = base.weight.t() if type(base) is Conv1D else base.weight  # Conv1D keeps [in, out]
    bias = base.bias
    if lora_b.bias is not None:
        update = lora_b.bias * scaling
        bias = update if bias is None else bias + update
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    return Operands(weight, lora_a.weight, lora_b.weight, scaling, bias, p)


def _fused(layer: Any, x: Tensor, adapter: str, parts: Parts, magnitude: Any = None) -> Tensor:
    found = _operands(parts, layer.scaling[adapter])
    if magnitude is None:
        call_plan.keep(layer, adapter, parts, found)
        return _of(x, found)
    weight, lora_a, lora_b, scaling, bias, dropout_p = found
    assert lora_a is not None and lora_b is not None
    return dora_linear(
        x, weight, lora_a, lora_b, magnitude.weight, scaling, bias=bias, dropout_p=dropout_p
    )


def _of(x: Tensor, operands: Operands) -> Tensor:
    weight, lora_a, lora_b, scaling, bias, dropout_p = operands
    assert lora_a is not None and lora_b is not None
    return lora_linear(x, weight, lora_a, lora_b, scaling, bias=bias, dropout_p=dropout_p)
