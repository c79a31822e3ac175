"""What a call of an adapted layer comes down to, kept for as long as nothing it hangs on changes.

Everything that PEFT's forward depends on is read at each call (eligibility.py): the active adapter,
merging, variants, hooks, the classes of the modules, scaling, dropout, the parameters. Reading it
with Python costs more than a small layer takes to compute. A plan is the outcome of one such
reading, and the list of what was read; the compiled library compares that list with the modules as
they are now (csrc/python/plain.h). Anything that differs, and the layer is read anew.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from lora_kernels.integrations.peft.eligibility import Parts
from lora_kernels.modules.layer_group import Operands
from lora_kernels.ops._eager import library_call

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks",
    "_global_backward_pre_hooks",
)  # fmt: skip
_POOR = 8  # plans that were hardly used before the layer gets no more of them


class CallPlan:
    """Operands of a layer and what they were read from. `own` are keys and values of the layer's
    own dictionary, which a plan does not hold: it must not keep its layer alive."""

    __slots__ = ("absent", "empty", "made", "operands", "own", "same", "tensors", "types", "used")

    tensors: tuple[Tensor | None, ...]
    own: tuple[Any, ...]
    same: tuple[Any, ...]
    absent: tuple[Any, ...]
    empty: tuple[Any, ...]
    types: tuple[Any, ...]

    def __init__(self) -> None:
        self.operands: Operands | None = None  # None: no plan
        self.used = self.made = 0


# Beside the layers, whose state is PEFT's: copies and pickles have no plan.
_plans: WeakKeyDictionary[Any, CallPlan] = WeakKeyDictionary()


def planned(layer: Any, x: Any) -> Operands | None:
    """The operands for x from the layer's plan; None: there is none, or it no longer stands."""
    if torch.compiler.is_compiling():
        return None
    plan = _plans.get(layer)
    if plan is None or plan.operands is None:
        return None
    stands = library_call("plan_stands")
    if stands is None or not stands(
        x, plan.tensors, layer.__dict__, plan.own, plan.same, plan.absent, plan.empty, plan.types
    ):
        return None
    plan.used += 1
    return plan.operands


def keep(layer: Any, adapter: str, parts: Parts, operands: Operands) -> None:
    """Plan further calls like the one these operands were just read for, where that can be."""
    if torch.compiler.is_compiling() or library_call("plan_stands") is None:
        return
    plan = _plans.setdefault(layer, CallPlan())
    plan.operands = None
    if plan.made >= _POOR and plan.used < 4 * plan.made:
        return  # its modules change from call to call
    if isinstance(parts.base, Conv1D) or parts.lora_b.bias is not None:
        return  # operands that are made anew for each call
    own, same, absent, empty = _read(layer, adapter, parts)
    pairs = zip(same[::3], same[1::3], same[2::3], strict=True)
    if any(isinstance(mapping, dict) and mapping.get(key) is not v for mapping, key, v in pairs):
        return
    plan.own, plan.same = tuple(own), tuple(same)
    plan.absent, plan.empty = tuple(absent), tuple(empty)
    plan.types = tuple(t for m in parts for t in (m, type(m)))
    plan.tensors = (operands.weight, operands.lora_a, operands.lora_b, operands.bias)
    plan.operands = operands
    plan.made += 1


def forget(layer: Any) -> None:
    _plans.pop(layer, None)


def _read(layer: Any, adapter: str, parts: Parts) -> tuple[list[Any], ...]:
    """Keys and values of the layer's own; (mapping, key, value of each); (mapping, key that is not
    there); containers that are empty: all that `eligibility` and the operands have looked at."""
    base, lora_a, lora_b, dropout = parts
    state, modules = layer.__dict__, layer._modules
    active, merged = state.get("_active_adapter"), state.get("merged_adapters")
    own: list[Any] = [
        "_modules", modules, "_disable_adapters", False, "_active_adapter", active,
        "merged_adapters", merged, "cast_input_dtype_enabled", True,
        "lora_variant", state.get("lora_variant"), "scaling", state.get("scaling"),
    ]  # fmt: skip
    same: list[Any] = [
        layer.scaling, adapter, layer.scaling[adapter], vars(forward_ad), "_current_level", -1
    ]  # fmt: skip
    if isinstance(active, list):
        same += [active, None, active[0]]
    for name, part in zip(("base_layer", "lora_A", "lora_B", "lora_dropout"), parts, strict=True):
        same += [modules, name, modules[name]]
        if name != "base_layer":
            inner: Any = modules[name]
            same += [inner._modules, adapter, part]
    for module in (base, lora_a, lora_b):
        parameters = module._parameters
        same += [parameters, "weight", module.weight, parameters, "bias", module.bias]
    for name in ("training", "p", "inplace") if type(dropout) is nn.Dropout else ():
        same += [dropout.__dict__, name, dropout.__dict__.get(name)]
    absent: list[Any] = [layer.lora_variant, adapter, base.__dict__, "_hf_tp_plan"]
    for parameter in (base.weight, base.bias, lora_a.weight, lora_b.weight):
        if isinstance(parameter, Tensor):
            absent += [vars(parameter), "ds_id"]
    empty: list[Any] = [merged]
    for part in parts:
        absent += [part.__dict__, "forward"]
        for name in _HOOKS:
            hooks = part.__dict__.get(name)
            same += [part.__dict__, name, hooks]
            empty.append(hooks)
    for name in _GLOBAL_HOOKS:
        hooks = vars(nn_module)[name]
        same += [vars(nn_module), name, hooks]
        empty.append(hooks)
    return own, same, absent, empty
