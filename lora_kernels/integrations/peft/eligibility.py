"""Whether a ``peft.tuners.lora.layer.Linear`` can take the fused path, and if not, why.

`layer_reason` looks at modules: asked by `apply` for each layer, and again on every call because
a hook or another adapter may have arrived since. `tensor_reason` looks at the tensors of one
call. An empty string means that the fused path gives what PEFT's forward would have given.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from lora_kernels.integrations.peft.quant_base import is_quantized
from lora_kernels.modules.grouped_linear import GroupedLinear

# And the quantized ones that quant_base.py knows. A GroupedLinear has got its adapter since.
_BASES = (nn.Linear, Conv1D, GroupedLinear)
_DROPOUTS = (nn.Dropout, nn.Identity)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DEVICES = ("cpu", "cuda", "meta")
_PLAIN = (Tensor, nn.Parameter, FakeTensor)


class Parts(NamedTuple):
    """The modules that one adapter's forward would call."""

    base: Any
    lora_a: Any
    lora_b: Any
    dropout: Any


def parts_of(layer: Any, adapter: str) -> Parts:
    # Attribute access on a module costs more than all checks on it together.
    modules: Any = layer._modules
    return Parts(
        modules["base_layer"],
        modules["lora_A"]._modules[adapter],
        modules["lora_B"]._modules[adapter],
        modules["lora_dropout"]._modules[adapter],
    )


def magnitude_of(layer: Any, adapter: str) -> Any:
    """The module that holds DoRA's magnitude of this adapter; None for an adapter without DoRA."""
    return layer.lora_magnitude_vector[adapter] if adapter in layer.lora_variant else None


def named_parameters(parts: Parts, magnitude: Any = None) -> list[tuple[str, Tensor]]:
    named = [
        ("base_layer.weight", parts.base.weight),
        ("lora_A.weight", parts.lora_a.weight),
        ("lora_B.weight", parts.lora_b.weight),
    ]
    for name, bias in (("base_layer.bias", parts.base.bias), ("lora_B.bias", parts.lora_b.bias)):
        if bias is not None:
            named.append((name, bias))
    if magnitude is not None:
        named.append(("lora_magnitude_vector.weight", magnitude.weight))
    return named


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def layer_reason(layer: LoraLayer, adapter: str, parts: Parts) -> str:
    """Why `adapter` of this layer cannot be fused, from the modules alone; "" when it can."""
    if adapter in layer.lora_variant:
        reason = _variant_reason(layer, adapter, parts)
        if reason:
            return reason
    base, lora_a, lora_b, dropout = parts
    if type(base) not in _BASES and not is_quantized(base):
        return f"base_layer is {qualified_name(type(base))}, not torch.nn.Linear"
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        odd = type(lora_b if type(lora_a) is nn.Linear else lora_a)
        return f"lora_A or lora_B is {qualified_name(odd)}, not torch.nn.Linear"
    if type(dropout) not in _DROPOUTS:
        return f"lora_dropout is {qualified_name(type(dropout))}, not torch.nn.Dropout"
    if type(dropout) is nn.Dropout and dropout.inplace:
        return "lora_dropout works in place"
    if lora_a.bias is not None:
        return "lora_A has a bias"
    if base.__dict__.get("_hf_tp_plan") is not None:
        return "base_layer is tensor parallel"
    scaling = layer.scaling[adapter]
    if type(scaling) not in (float, int):
        return f"scaling is a {type(scaling).__name__}, not a number"
    if not torch.compiler.is_compiling() and not math.isfinite(scaling):
        return f"scaling is {scaling}"
    for role, module in zip(Parts._fields, parts, strict=True):
        reason = _watched(module)
        if reason:
            return f"{_ROLES[role]} {reason}"
    return ""


def _watched(module: nn.Module) -> str:
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has hooks, which run only when it is called"
    return "has a forward of its own on the instance" if "forward" in module.__dict__ else ""


def _variant_reason(layer: Any, adapter: str, parts: Parts) -> str:
    """Why an adapter that is a variant cannot be fused; DoRA over a dense weight can."""
    variant = type(layer.lora_variant[adapter])
    if variant is not DoraLinearVariant:
        return f"the adapter is a LoRA variant ({variant.__name__})"
    magnitude = magnitude_of(layer, adapter)
    if is_quantized(parts.base):
        return f"the adapter is DoRA ({variant.__name__}) over a quantized weight"
    if type(magnitude) is not DoraLinearLayer:
        return f"lora_magnitude_vector is {qualified_name(type(magnitude))}"
    if parts.lora_b.bias is not None:
        return "the adapter is DoRA and lora_B has a bias"
    reason = _watched(magnitude)
    return f"lora_magnitude_vector {reason}" if reason else ""


_ROLES = {"base": "base_layer", "lora_a": "lora_A", "lora_b": "lora_B", "dropout": "lora_dropout"}


def mode_reason() -> str:
    """Why nothing can be fused in the interpreter state of this moment."""
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "global module hooks are registered"
    if torch.compiler.is_compiling():
        return "torch.export keeps library ops only" if torch.compiler.is_exporting() else ""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "inside forward-mode differentiation"
    if torch.jit.is_tracing():
        return "torch.jit.trace records library ops only"
    return ""


def parameters_reason(named: list[tuple[str, Tensor]]) -> str:
    """Why these weights cannot be read as plain tensors of one device."""
    device = named[0][1].device
    if device.type not in _DEVICES:
        return f"the device type {device.type} has no fused kernels"
    for name, t in named:
        if type(t) not in _PLAIN:
            return f"{name} is a {qualified_name(type(t))}, not a plain tensor"
        if hasattr(t, "ds_id"):
            return f"{name} is partitioned by DeepSpeed ZeRO-3"
        if t.dtype not in DTYPES:
            return f"{name} is {t.dtype}"
        if t.device != device:
            return f"{name} is on {t.device.type} but base_layer.weight is on {device.type}"
    return ""


def input_reason(x: Any) -> str:
    """Why `x` cannot be an input of the op."""
    if type(x) not in _PLAIN or x.is_nested or x.layout is not torch.strided:
        return f"the input is a {qualified_name(type(x))} that is not a plain dense tensor"
    return ""


def tensor_reason(layer: LoraLayer, x: Any, named: list[tuple[str, Tensor]]) -> str:
    """Why this input and these parameters cannot be fused; "" when they can."""
    reason = input_reason(x) or parameters_reason(named)
    if reason:
        return reason
    weight, lora_a, lora_b = named[0][1], named[1][1], named[2][1]
    if x.device != weight.device:
        return f"the input is on {x.device.type} but the weights are on {weight.device.type}"
    if weight.dim() != 2 or lora_a.dim() != 2 or lora_b.dim() != 2:
        return "the weights are sharded and not gathered"
    dtype = x.dtype
    # Autocast does not know the device type meta and raises for it.
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        if dtype not in DTYPES or torch.float64 in (dtype, *(t.dtype for _, t in named)):
            return f"autocast does not convert all of {dtype} inputs and {weight.dtype} weights"
        return ""
    for name, t in named:
        if t.dtype != dtype and name.startswith("base_layer"):
            return f"the input is {dtype} but {name} is {t.dtype}"
        if t.dtype != lora_a.dtype and name.startswith("lora_B"):
            return f"lora_A.weight is {lora_a.dtype} but {name} is {t.dtype}"
    if lora_a.dtype != dtype and not layer.cast_input_dtype_enabled:
        return f"the input is {dtype}, lora_A.weight {lora_a.dtype}, and casting is turned off"
    return ""
