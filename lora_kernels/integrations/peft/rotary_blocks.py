"""Attention blocks of transformers models whose rotary embedding is the op: a class swap.

A block's forward looks `apply_rotary_pos_emb` up among the globals of its module. The class that a
block gets here runs the very code of that forward, with all globals of the module but this one. So
nothing else of the forward is written a second time, and no other model of the process sees a
change. What the module's function computes is found out by calling it; one that is another
rotation than the op's is left alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.modules.blocks import blocks_of
from lora_kernels.modules.report import FUSED, STOCK
from lora_kernels.ops import _dispatch, explain, rope

KIND = "rotary_embedding"
NAME = "apply_rotary_pos_emb"


class RotaryBlock:
    """Mark of the subclasses that :func:`fused_class` makes."""

    stock: Any


class Rotation(NamedTuple):
    """What a model's function does with tables that are as wide as a head, narrower, or half as
    wide; and whether results have the dtype of q where the tables have a wider one."""

    whole: bool
    partial: bool
    halved: bool
    keeps_dtype: bool


def fuse_rotary(model: nn.Module) -> tuple[list[dict[str, Any]], list[tuple[nn.Module, Any, Any]]]:
    """(an entry of the report for every block of the table that rotates, (block, its class, the
    class to give it) for those that change)."""
    entries, changes = [], []
    for path, block, _ in blocks_of(model):
        cls = plain_class(type(block))
        stock = stock_class(cls)
        if NAME not in _names(getattr(stock.forward, "__code__", None)):
            continue
        reason = _reason(block, stock)
        entries.append({
            "kind": KIND, "name": path, "members": [NAME],
            "status": STOCK if reason else FUSED, "reason": reason,
        })  # fmt: skip
        if reason and cls is not stock:
            changes.append((block, cls, stock))
        elif not reason and cls is stock:
            changes.append((block, stock, fused_class(stock)))
    return entries, changes


def plain_class(cls: type) -> Any:
    """The class that fully_shard made its subclass from."""
    if cls.__name__.startswith("FSDP") and cls.__bases__[0].__name__ == "FSDPModule":
        return cls.__bases__[-1]
    return cls


def stock_class(cls: Any) -> Any:
    return cls.stock if issubclass(cls, RotaryBlock) else cls


def _reason(block: nn.Module, stock: Any) -> str:
    if _dispatch.disabled("rope", "apply"):
        return "disabled by LORA_KERNELS_DISABLE"
    if "forward" in block.__dict__ and not isinstance(block, RotaryBlock):
        return "the block has a forward of its own on the instance"
    function = stock.forward.__globals__.get(NAME)
    if rotation_of(function) is None:
        return f"{NAME} of {stock.__module__} is another rotation than the op's"
    return ""


def _names(code: Any) -> set[str]:
    """Names that the code and what it defines look up."""
    if not isinstance(code, CodeType):
        return set()
    return set(code.co_names).union(*map(_names, code.co_consts))


@functools.lru_cache(maxsize=256)
def rotation_of(function: Any) -> Rotation | None:
    """What `function`, an ``apply_rotary_pos_emb``, computes; None: not what the op does."""
    if not callable(function):
        return None
    found = Rotation(
        whole=_agrees(function, 8, 8), partial=_agrees(function, 6, 6),
        halved=_agrees(function, 4, 8), keeps_dtype=_keeps_dtype(function),
    )  # fmt: skip
    return found if found.whole or found.halved else None


def _example(width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, width), (2, 5, width))
    q, k, cos, sin = (
        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        for shape in shapes
    )
    return q, k, cos, sin


def _agrees(function: Callable[..., Any], width: int, rotated: int) -> bool:
    """Does it rotate as the op, given tables of `width` channels for heads of 8."""
    q, k, cos, sin = _example(width)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            theirs = function(q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    ours = rope(
        q.transpose(1, 2), k.transpose(1, 2), *(_repeated(t, rotated) for t in (cos, sin)),
        backend="reference",
    )  # fmt: skip
    return (
        isinstance(theirs, tuple)
        and len(theirs) == 2
        and all(
            isinstance(a, Tensor)
            and b is not None
            and a.shape == b.transpose(1, 2).shape
            and bool(((a - b.transpose(1, 2)).abs() <= 64 * torch.finfo(b.dtype).eps).all())
            for a, b in zip(theirs, ours, strict=True)
        )
    )


def _repeated(table: Tensor, rotated: int) -> Tensor:
    return table if table.shape[-1] == rotated else torch.cat([table, table], -1)


def _keeps_dtype(function: Callable[..., Any]) -> bool:
    for width in (8, 4):
        q, k, cos, sin = _example(width)
        try:
            result = function(q.half(), k.half(), cos.float(), sin.float())
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
        return all(isinstance(t, Tensor) and t.dtype == torch.float16 for t in result)
    return False


def _rotate_with(stock: Callable[..., Any], known: Rotation) -> Callable[..., Any]:
    """What stands for the function `stock` in a forward; it runs `stock` wherever in doubt."""

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        rotated = 0 if args or kwargs else _rotated_channels(known, q, k, cos, sin)
        if not rotated:
            return stock(q, k, cos, sin, *args, **kwargs)
        cos, sin = (_repeated(t, rotated) for t in (cos, sin))
        turned, keys = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        assert keys is not None
        return turned.transpose(1, 2), keys.transpose(1, 2)

    return apply_rotary_pos_emb


def _rotated_channels(known: Rotation, q: Any, k: Any, cos: Any, sin: Any) -> int:
    """How many channels of a head the op has to rotate; 0: the call is the model's own."""
    if not all(type(t) is Tensor for t in (q, k, cos, sin)) or _watched():
        return 0
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return 0
    (B, H, S, D), width = q.shape, cos.shape[-1]
    fits = (
        k.shape[0] == B and k.shape[2:] == q.shape[2:] and cos.shape[0] in (1, B)
        and cos.shape[1] == S and q.dtype == k.dtype and cos.dtype == sin.dtype
        and not cos.requires_grad and not sin.requires_grad
    )  # fmt: skip
    dtypes = cos.dtype == q.dtype or (
        known.keeps_dtype and cos.dtype.is_floating_point and q.dtype.is_floating_point
    )
    if not fits or not dtypes or not q.device == k.device == cos.device == sin.device:
        return 0
    if width == D:
        rotated = D if known.whole else 0
    elif known.halved and 2 * width == D:
        rotated = D
    else:
        rotated = width if known.partial and 0 < width < D else 0
    if rotated < 2 or rotated % 2:
        return 0
    place = (q.device.type, q.device.index)
    environment = tuple(os.environ.get(f"LORA_KERNELS_{n}", "") for n in ("BACKEND", "DISABLE"))
    return rotated if _taken(B, S, H, D, k.shape[1], rotated, q.dtype, place, environment) else 0


def _watched() -> bool:
    """Modes in which a model's own code is what has to run."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


@functools.lru_cache(maxsize=1024)
def _taken(
    B: int, S: int, H: int, D: int, Hk: int, R: int, dtype: torch.dtype,
    place: tuple[str, int | None], environment: tuple[str, ...],
) -> bool:  # fmt: skip
    """Has the op kernels of its own for this; library calls the model makes by itself. Cached on
    all that the answer depends on: `place` and `environment` serve the key alone."""
    if place[0] not in ("cpu", "cuda") or dtype not in (
        torch.float32, torch.bfloat16, torch.float16, torch.float64
    ):  # fmt: skip
        return False
    told = explain("rope", B=B, S=S, H=H, D=D, Hk=Hk, R=R, dtype=dtype, device=place[0])
    return told["backend"] != "aten" or environment[0] == "aten"


class _Bound(NamedTuple):
    forward: Any
    names: tuple[str, ...]
    values: tuple[Any, ...]
    made: FunctionType


_bound: dict[Any, _Bound] = {}
_missing = object()


def _rebound(cls: Any) -> Any:
    """The forward of `cls` with the op among its globals; made anew where the module's have
    changed. The forward itself where it is not one that can be bound."""
    forward = cls.forward
    if not isinstance(forward, FunctionType):
        return forward
    scope = forward.__globals__
    held = _bound.get(cls)
    if held is not None and held.forward is forward:
        pairs = zip(held.names, held.values, strict=True)
        if all(scope.get(name, _missing) is value for name, value in pairs):
            return held.made
    function, names = scope.get(NAME), tuple(_names(forward.__code__))
    known = rotation_of(function) if NAME in names else None
    if known is None or function is None:
        return forward
    code = forward.__code__
    made = FunctionType(
        code.replace(co_name=code.co_name), {**scope, NAME: _rotate_with(function, known)},
        forward.__name__, forward.__defaults__, forward.__closure__,
    )  # fmt: skip
    made.__kwdefaults__ = forward.__kwdefaults__
    _bound[cls] = _Bound(forward, names, tuple(scope.get(n, _missing) for n in names), made)
    return made


@functools.cache
def fused_class(cls: Any) -> Any:
    """A subclass of exactly `cls` that prints as it and is found in the table of blocks as it."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = cls.forward if _watched() else _rebound(cls)
        return run(self, *args, **kwargs)

    members = {
        "forward": forward, "stock": cls, "__reduce_ex__": _reduce,
        "__module__": cls.__module__, "__doc__": cls.__doc__, "__qualname__": cls.__qualname__,
    }  # fmt: skip
    return type(cls.__name__, (RotaryBlock, cls), members)


def _reduce(self: Any, protocol: Any) -> Any:
    """Copies and pickles: the class is made again from the one that has a name."""
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _restored, (self.stock,), state


def _restored(stock: Any) -> Any:
    cls = fused_class(stock)
    return cls.__new__(cls)


def rotary_blocks(model: nn.Module, deep: bool = True) -> Iterator[tuple[nn.Module, Any, Any]]:
    """(block, its class, its stock class) of every block that was changed; of `model` alone where
    it is not `deep`."""
    for module in model.modules() if deep else (model,):
        cls = plain_class(type(module))
        if issubclass(cls, RotaryBlock):
            yield module, cls, cls.stock
