"""MLP blocks of transformers models on the fused activation: a class swap of the block.

The block's layers run as before, their hooks included; where nothing watches them and all of them
have an adapter, the whole MLP is one autograd node (modules/mlp_function.py). Where a block does
more than its MLP, its own forward runs, around that node (modules/deferred_mlp.py).
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers import activations

from lora_kernels.integrations.peft import linear
from lora_kernels.modules import grouped_lora_linear
from lora_kernels.modules.blocks import Mlp, blocks_of, child
from lora_kernels.modules.deferred_mlp import run_around
from lora_kernels.modules.grouped_linear import has_hooks
from lora_kernels.modules.grouped_lora_linear import GroupedLoRALinear
from lora_kernels.modules.layer_group import Operands, group_of
from lora_kernels.modules.lora_linear import LoRALinear
from lora_kernels.modules.lora_mlp import activate_and_project
from lora_kernels.modules.mlp_function import fused_mlp
from lora_kernels.modules.report import FUSED, STOCK
from lora_kernels.ops import _dispatch, explain

SHRINK = "_lora_kernels_shrink"  # of a block: whether its activation makes S of the last layer
KIND, RECOMPUTED = "gated_activation", "recomputed_activation"
_EAGER = ("aten", "reference")  # backends that gain nothing over what the model spells out
_ROWS = 1024  # of the problem that a block is judged by
_PASSED = (nn.Dropout, nn.Identity, nn.LayerNorm)


class FusedMlp:
    """Mark of the subclasses that :func:`fuse_activations` makes. `stock`: the block's own class;
    `mlp`: the names of its layers; `recompute`: the activation is not kept for the backward."""

    stock: Any
    mlp: Mlp
    recompute = False


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


def fuse_activations(
    model: nn.Module, recompute: bool
) -> tuple[list[dict[str, Any]], list[tuple[nn.Module, Any, Any]]]:
    """(an entry of the report for every MLP block of the table, (block, its class, the class to
    give it) for those that change)."""
    entries, changes = [], []
    for path, block, row in blocks_of(model):
        if row.mlp is None:
            continue
        cls = _plain_class(type(block))
        stock = cls.stock if issubclass(cls, FusedMlp) else cls
        reason = _reason(block, stock, row.mlp)
        kept = _kept_anyway(block, row.mlp) if recompute else ""
        unpaid = _unpaid(block, row.mlp)
        if recompute:
            entries.append(_entry(RECOMPUTED, path, (row.mlp.act, row.mlp.down), reason or kept))
        if not recompute or kept:
            entries.append(_entry(KIND, path, (row.mlp.act,), reason or unpaid))
        again = recompute and not kept
        able = not reason and (again or not unpaid)
        new = fused_class(stock, again, row.mlp) if able else stock
        if cls is not new:
            changes.append((block, cls, new))
    return entries, changes


def mlp_blocks(model: nn.Module, deep: bool = True) -> list[tuple[nn.Module, Any, Any]]:
    """(block, its class, its stock class) of every block that was changed; of `model` alone where
    it is not `deep`."""
    found = []
    for module in model.modules() if deep else (model,):
        cls = _plain_class(type(module))
        if issubclass(cls, FusedMlp):
            found.append((module, cls, cls.stock))
    return found


def _entry(kind: str, path: str, members: tuple[str, ...], reason: str) -> dict[str, Any]:
    return {
        "kind": kind, "name": path, "members": list(members),
        "status": STOCK if reason else FUSED, "reason": reason,
    }  # fmt: skip


def _plain_class(cls: type) -> Any:
    """The class that fully_shard made its subclass from."""
    if cls.__name__.startswith("FSDP") and cls.__bases__[0].__name__ == "FSDPModule":
        return cls.__bases__[-1]
    return cls


def _reason(block: nn.Module, stock: Any, mlp: Mlp) -> str:
    if _dispatch.disabled(KIND, "apply"):
        return "disabled by LORA_KERNELS_DISABLE"
    own = block.__dict__.get("forward")
    if own is not None:
        return "the block has a forward of its own on the instance"
    for name in (mlp.gate, mlp.up, mlp.down):
        if name and child(block, name) is None:
            return f"the block has no {name}"
    act = child(block, mlp.act)
    return "" if activation_kind(act) else f"the activation is {type(act).__name__}"


def _kept_anyway(block: nn.Module, mlp: Mlp) -> str:
    """Why there is nothing to recompute for."""
    down = child(block, mlp.down)
    if hasattr(down, "lora_A") or isinstance(down, LoRALinear):
        return ""
    return f"{mlp.down} has no adapter, so its input is not kept anyway"


def _unpaid(block: nn.Module, mlp: Mlp) -> str:
    """Why the model's own activation is as quick, for the dtype and device of its weights."""
    weight = next(iter(block.parameters()), None)
    if weight is None or weight.is_meta or not weight.is_floating_point():
        return ""  # a call looks again
    return _unpaid_for(
        activation_kind(child(block, mlp.act)), bool(mlp.up or mlp.packed), weight.dtype,
        weight.device.type, _environment(),
    )  # fmt: skip


def _environment() -> tuple[str, ...]:
    names = ("LORA_KERNELS_BACKEND", "LORA_KERNELS_DISABLE", "LORA_KERNELS_CPU_ISA")
    return tuple(os.environ.get(n, "") for n in names)


@functools.lru_cache(maxsize=64)
def _unpaid_for(
    kind: str, gated: bool, dtype: torch.dtype, device: str, environment: tuple[str, ...]
) -> str:
    """`environment` serves the key alone."""
    if not kind or dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return f"no kernel takes {dtype}"
    told = explain(KIND, M=_ROWS, N=_ROWS, kind=kind, gated=gated, dtype=dtype, device=device)
    return f"no kernel beats the model's own: {told['reason']}" if told["backend"] in _EAGER else ""


def _applies(block: nn.Module, mlp: Mlp, x: Tensor) -> bool:
    """Nothing watches the activation. Without gradients, too: the first pass of a reentrant
    checkpoint has none, and has to give the bits of the second."""
    act = child(block, mlp.act)
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
        and type(x) is Tensor
        and not any(hooks)
        and bool(activation_kind(act))
        and not _drops(block, mlp)
        and not _casts(block, mlp, x)
    )


def _casts(block: nn.Module, mlp: Mlp, x: Tensor) -> bool:
    """T5 converts the argument of a down projection of another dtype."""
    weight = getattr(block._modules[mlp.down], "weight", None) if mlp.inner_dropout else None
    return isinstance(weight, Tensor) and weight.dtype != x.dtype


def _drops(block: nn.Module, mlp: Mlp) -> bool:
    """The argument of down is dropped from, or watched on its way."""
    inner: Any = block._modules.get(mlp.inner_dropout) if mlp.inner_dropout else None
    if inner is None:
        return False
    return type(inner) is not nn.Dropout or (inner.training and inner.p > 0) or has_hooks(inner)


def _operands(layer: Any, x: Tensor) -> Operands | None:
    """What one call for the whole block needs of a layer; None: it computes by itself."""
    if has_hooks(layer) or "forward" in layer.__dict__:
        return None
    if type(layer) is linear.FusedLoraLinear:
        found = linear.operands(layer, x)
    elif type(layer) in (LoRALinear, GroupedLoRALinear):
        found = grouped_lora_linear.operands(layer, x)
    else:
        return None
    return found if type(found) is Operands else None


def _as_one(block: Any, mlp: Mlp, x: Tensor, kind: str) -> Tensor | None:
    """The block as one node, dropout of its result aside; None where that cannot be."""
    first = [child(block, name) for name in (mlp.gate, mlp.up) if name]
    if len(first) > 1 and not mlp.inside and not _grouped(first):
        return None
    found = []
    for layer in (*first, child(block, mlp.down)):
        operands = _operands(layer, x)
        if operands is None:
            return None
        found.append(operands)
    group = group_of(first[0])
    shrunk = None if group is None else group.take(x, found[:-1])
    shrink = block.__dict__.get(SHRINK, False)
    return fused_mlp(x, found[:-1], found[-1], kind, block.recompute, shrink, shrunk, mlp.packed)


def _grouped(layers: list[nn.Module]) -> bool:
    """They may be computed together, and have not been found to differ in their input."""
    group = group_of(layers[0])
    return group is not None and not group.dissolved and group is group_of(layers[1])


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    stock, mlp = self.stock, self.mlp
    if mlp.inside:
        if _watched_between(self, mlp):
            return stock.forward(self, *args, **kwargs)
        fits, whole = functools.partial(_fits, self, mlp), functools.partial(_whole, self, mlp)
        return run_around(stock.forward, self, mlp, fits, whole, args, kwargs)
    x = args[0] if len(args) == 1 and not kwargs else None
    if x is None or not _fits(self, mlp, x):
        return stock.forward(self, *args, **kwargs)
    y = _whole(self, mlp, x)
    return self._modules[mlp.dropout](y) if mlp.dropout else y


def _fits(block: Any, mlp: Mlp, x: Tensor) -> bool:
    """The MLP of this input is ours to compute."""
    if not _applies(block, mlp, x):
        return False
    kind = activation_kind(child(block, mlp.act))
    return block.recompute or not _unpaid_for(
        kind, bool(mlp.up or mlp.packed), _dtype_of_call(x), x.device.type, _environment()
    )


def _watched_between(block: Any, mlp: Mlp) -> bool:
    """The forward cannot run on a stand-in: it is traced, a module on the way to the layers is
    watched, or one that a result may pass on its way to the next layer."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    found: set[Any] = {block}
    for path in (mlp.gate, mlp.down):
        above = path.rpartition(".")[0]
        if above:
            module: Any = child(block, above)
            if module is None or has_hooks(module) or "forward" in module.__dict__:
                return True
            found.add(module)
    children = (m for module in found for m in module._modules.values())
    if any(type(m) in _PASSED and (has_hooks(m) or "forward" in m.__dict__) for m in children):
        return True
    return any(child(block, p) is None for p in (mlp.gate, mlp.up or mlp.gate, mlp.act, mlp.down))


def _whole(block: Any, mlp: Mlp, x: Tensor) -> Tensor:
    """The MLP of x: one node, or its layers one by one around the fused activation."""
    kind = activation_kind(child(block, mlp.act))
    y = _as_one(block, mlp, x, kind)
    if y is not None:
        return y
    layers: list[Any] = [child(block, p) for p in (mlp.gate, mlp.up, mlp.act, mlp.down) if p]
    first, *second, act, down = layers
    gate: Tensor = first(x)
    up: Tensor | None = second[0](x) if second else None
    if mlp.packed:
        gate, up = gate.chunk(2, dim=-1)
    if type(gate) is not Tensor or (up is not None and up.dtype != gate.dtype):
        h = act(gate)
        return down(h if up is None else h * up)
    shrink = block.__dict__.get(SHRINK, False)
    found = _operands(down, gate) if shrink else None
    return activate_and_project(down, gate, up, kind, block.recompute, shrink, found)


def _dtype_of_call(x: Tensor) -> torch.dtype:
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


@functools.cache
def fused_class(cls: Any, recompute: bool, mlp: Mlp) -> Any:
    """A subclass of exactly `cls` that prints as it and is found in the table of blocks as it."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, *args, **kwargs)

    members = {
        "forward": forward, "stock": cls, "mlp": mlp, "recompute": recompute,
        "__reduce_ex__": _reduce, "__module__": cls.__module__, "__doc__": cls.__doc__,
        "__qualname__": cls.__qualname__,
    }  # fmt: skip
    return type(cls.__name__, (FusedMlp, cls), members)


def _reduce(self: Any, protocol: Any) -> Any:
    """Copies and pickles: the class is made again from the one that has a name."""
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _restored, (self.stock, self.recompute, self.mlp), state


def _restored(stock: Any, recompute: bool, mlp: Mlp) -> Any:
    cls = fused_class(stock, recompute, mlp)
    return cls.__new__(cls)
