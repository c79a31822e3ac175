"""PEFT's LoRA layers over quantized weights, on one fused op.

Base layers: bitsandbytes' Linear4bit and Linear8bitLt under PEFT's layers for them, and this
package's QuantLinear under PEFT's ordinary ``lora.Linear``.

The 8-bit layer differs from bitsandbytes' on purpose: that one rounds the activations to eight bits
as well, this one does not.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from lora_kernels.integrations.peft import eligibility
from lora_kernels.integrations.peft.eligibility import Parts
from lora_kernels.integrations.peft.quant_base import QuantBase, quantized_base
from lora_kernels.modules.layer_group import QuantOperands
from lora_kernels.ops.quant_linear import quant_lora_linear


def call_reason(layer: LoraLayer, x: Any, parts: Parts, base: QuantBase) -> str:
    """Why this input and these parameters cannot be fused; "" when they can."""
    named = [("lora_A.weight", parts.lora_a.weight), ("lora_B.weight", parts.lora_b.weight)]
    for name, bias in (("base_layer.bias", base.bias), ("lora_B.bias", parts.lora_b.bias)):
        if bias is not None:
            named.append((name, bias))
    reason = eligibility.input_reason(x) or eligibility.parameters_reason(named)
    if reason:
        return reason
    if x.device != base.q.device or x.device != named[0][1].device:
        return f"the input is on {x.device.type} but not all of the weights are"
    if any(t.dim() != 2 for _, t in named[:2]):
        return "the adapter is sharded and not gathered"
    if x.dtype not in eligibility.DTYPES:
        return f"the input is {x.dtype}"
    if x.dtype != named[0][1].dtype and not layer.cast_input_dtype_enabled:
        return f"the input is {x.dtype}, lora_A.weight {named[0][1].dtype}, and casting is off"
    return ""


def settle_compute_dtype(base: Any, x: Tensor) -> None:
    """What a Linear4bit does at its first call."""
    if getattr(base, "compute_type_is_set", True) is False:
        base.set_compute_type(x)
        base.compute_type_is_set = True


def operands(parts: Parts, base: QuantBase, scaling: float) -> QuantOperands:
    """What the op needs for one call."""
    bias, dropout = base.bias, parts.dropout
    if parts.lora_b.bias is not None:
        update = parts.lora_b.bias * scaling
        bias = update if bias is None else bias + update
    rate = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    return QuantOperands(
        base.q, parts.lora_a.weight, parts.lora_b.weight, scaling, bias, rate, base.compute_dtype
    )


def fused(x: Tensor, parts: Parts, base: QuantBase, scaling: float) -> Tensor:
    """x ``[..., in_features]`` -> ``[..., out_features]`` in the dtype of x, or autocast's."""
    q, lora_a, lora_b, scaling, bias, dropout_p, dtype = operands(parts, base, scaling)
    y = quant_lora_linear(
        x if dtype is None else x.to(dtype), q, lora_a, lora_b, scaling, bias=bias,
        dropout_p=dropout_p,
    )  # fmt: skip
    return y if base.compute_dtype is None else y.to(x.dtype)


def prepared(layer: LoraLayer, parts: Parts, x: Any) -> tuple[QuantBase | None, str]:
    """(the quantized base, "") for a call that can be fused, or (None, why not)."""
    if isinstance(x, Tensor):
        settle_compute_dtype(parts.base, x)
    base, reason = quantized_base(parts.base)
    if base is None:
        return None, reason
    reason = call_reason(layer, x, parts, base)
    return (None, reason) if reason else (base, "")
