"""MLP blocks of transformers models that recompute their activation: a class swap of the block."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers import activations

from lora_kernels.modules.blocks import Mlp, blocks_of, row_of
from lora_kernels.modules.lora_linear import LoRALinear
from lora_kernels.modules.lora_mlp import activate_and_project
from lora_kernels.modules.report import FUSED, STOCK

KIND = "recomputed_activation"


class RecomputedMlp:
    """Mark of the subclasses that :func:`recompute_activations` makes."""


def activation_kind(module: Any) -> str:
    """The op's name of a transformers or torch activation; "" when it has none."""
    kinds = {
        nn.SiLU: "silu", activations.SiLUActivation: "silu", nn.ReLU: "relu",
        activations.ReLUSquaredActivation: "relu_squared",
        activations.NewGELUActivation: "gelu_tanh", activations.GELUTanh: "gelu_tanh",
    }  # fmt: skip
    if type(module) is activations.GELUActivation:
        return "gelu" if module.act is F.gelu else ""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return kinds.get(type(module), "")


def recompute_activations(model: nn.Module) -> tuple[list[dict[str, Any]], list[nn.Module]]:
    """(an entry of the report for every MLP block of the table, the blocks that changed)."""
    entries, changed = [], []
    for path, block, row in blocks_of(model):
        if row.mlp is None:
            continue
        reason = _reason(block, row.mlp)
        entries.append({
            "kind": KIND, "name": path, "members": [row.mlp.act, row.mlp.down],
            "status": STOCK if reason else FUSED, "reason": reason,
        })  # fmt: skip
        if not reason and not isinstance(block, RecomputedMlp):
            cls: Any = type(block)
            block.__class__ = _recomputed_class(cls)
            changed.append(block)
    return entries, changed


def to_stock(block: nn.Module) -> bool:
    """Give a block its own class back; False for any other module."""
    if not isinstance(block, RecomputedMlp):
        return False
    stock: Any = type(block).__mro__[2]
    block.__class__ = stock
    return True


def _reason(block: nn.Module, mlp: Mlp) -> str:
    if type(block).__name__.startswith("FSDP"):
        return "the block is wrapped by fully_shard"
    if "forward" in block.__dict__:
        return "the block has a forward of its own on the instance"
    down = block._modules.get(mlp.down)
    if not (hasattr(down, "lora_A") or isinstance(down, LoRALinear)):
        return f"{mlp.down} has no adapter, so its input is not kept anyway"
    act = block._modules.get(mlp.act)
    if not activation_kind(act):
        return f"the activation is {type(act).__name__}"
    return ""


def _applies(block: nn.Module, mlp: Mlp, x: Tensor) -> bool:
    """Nothing watches the activation. Without gradients, too: the first pass of a reentrant
    checkpoint has none, and has to give the bits of the second."""
    act = block._modules[mlp.act]
    hooks = (
        act is not None and (act._forward_hooks or act._forward_pre_hooks or act._backward_hooks),
        nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks,
    )  # fmt: skip
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and isinstance(x, Tensor)
        and not any(hooks)
        and bool(activation_kind(act))
    )


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    stock: Any = type(self).__mro__[2]
    row = row_of(stock)
    mlp = None if row is None else row.mlp
    x = args[0] if len(args) == 1 and not kwargs else None
    if mlp is None or x is None or not _applies(self, mlp, x):
        return stock.forward(self, *args, **kwargs)
    layers = self._modules
    gate: Tensor = layers[mlp.gate](x)
    up: Tensor | None = layers[mlp.up](x) if mlp.up else None
    if mlp.packed:
        gate, up = gate.chunk(2, dim=-1)
    kind = activation_kind(layers[mlp.act])
    y = activate_and_project(layers[mlp.down], gate, up, kind, recompute=True)
    return layers[mlp.dropout](y) if mlp.dropout else y


@functools.cache
def _recomputed_class(cls: Any) -> Any:
    """A subclass of exactly `cls` that prints as it."""
    return type(
        cls.__name__, (RecomputedMlp, cls),
        {"forward": _forward, "__module__": cls.__module__, "__doc__": cls.__doc__},
    )  # fmt: skip
