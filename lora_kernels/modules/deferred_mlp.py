"""The MLP inside of a larger forward, computed by one call: its layers answer with stand-ins.

The block's own forward runs, on an object that shares the block's attributes but for the layers of
the MLP. Such a layer computes nothing: it gives a :class:`Deferred`, which goes through the
activation, the product with up and a dropout that drops nothing; the last layer then computes all.
Whatever else is done with a Deferred is done with the tensor that the block's layers, called one by
one, would have given. So a wrong guess costs time and never a result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.modules.blocks import Mlp, child

_GATE, _UP, _PACKED, _ACTIVE, _WHOLE = "gate", "up", "packed", "activation", "product"


def run_around(
    forward: Callable[..., Any], block: nn.Module, mlp: Mlp, fits: Callable[[Tensor], bool],
    whole: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """``forward(block, *args, **kwargs)`` with its MLP computed by `whole`.

    Args:
        forward: of the block's class.
        mlp: names of the layers; with paths, the modules in between must not be watched.
        fits: whether the MLP of this input may be computed by `whole`.
        whole: input of the first layers -> result of the last.

    Raises:
        RuntimeError: the input of the MLP was changed in place before the last layer ran.
    """
    return _settled(
        forward(_stand_in(block, _Sites(block, mlp, fits, whole).tree()), *args, **kwargs)
    )


class _Trace:
    """One pass through the MLP: its input, and what had to be computed after all."""

    def __init__(self, sites: _Sites, x: Tensor) -> None:
        self.sites, self.x = sites, x
        self.values: dict[str, Tensor] = {}
        self.version = _version(x)

    def value(self, stage: str) -> Tensor:
        if stage not in self.values:
            self.values[stage] = self._compute(stage)
        return self.values[stage]

    def _compute(self, stage: str) -> Tensor:
        call, mlp = self.sites.call, self.sites.mlp
        if stage == _WHOLE:
            return self.value(_ACTIVE) * self.value(_UP)
        if stage == _ACTIVE:
            return call(mlp.act, self.value(_GATE))
        if mlp.packed and stage != _PACKED:
            halves = self.value(_PACKED).chunk(2, dim=-1)
            return halves[0 if stage == _GATE else 1]
        self.check()
        return call(mlp.up if stage == _UP else mlp.gate, self.x)

    def check(self) -> None:
        if _version(self.x) != self.version:
            raise RuntimeError(
                f"the input of {self.sites.mlp.gate} was changed in place before "
                f"{self.sites.mlp.down} ran; set LORA_KERNELS_DISABLE=gated_activation"
            )


class _Sites:
    """The layers of an MLP as their block sees them during one forward."""

    def __init__(
        self, block: nn.Module, mlp: Mlp, fits: Callable[[Tensor], bool],
        whole: Callable[[Tensor], Tensor],
    ) -> None:  # fmt: skip
        self.block, self.mlp, self.fits, self.whole = block, mlp, fits, whole
        self.trace: _Trace | None = None

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        layer: Any = child(self.block, name)
        return layer(*args, **kwargs)

    def tree(self) -> dict[str, Any]:
        """Attribute name -> what answers for it; for modules in between such a dict."""
        mlp = self.mlp
        answers: list[tuple[str, Callable[..., Any]]] = [
            (mlp.gate, self.first(_PACKED if mlp.packed else _GATE, mlp.gate)),
            (mlp.act, self.activation), (mlp.down, self.last),
        ]  # fmt: skip
        if mlp.up:
            answers.append((mlp.up, self.first(_UP, mlp.up)))
        found: dict[str, Any] = {}
        for path, answer in answers:
            *above, name = path.split(".")
            at = found
            for part in above:
                at = at.setdefault(part, {})
            at[name] = _Site(child(self.block, path), answer)
        return found

    def first(self, stage: str, name: str) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if len(args) == 1 and not kwargs else None
            if type(x) is not Tensor:
                return self.call(name, *_settled(args), **_settled(kwargs))
            trace = self.trace
            if trace is None or trace.x is not x or trace.version != _version(x):
                if not self.fits(x):
                    return self.call(name, x)
                trace = self.trace = _Trace(self, x)
            return Deferred(trace, stage)

        return answer

    def activation(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if len(args) == 1 and not kwargs else None
        if type(given) is Deferred and given._stage == _GATE and not given._trace.values:
            return Deferred(given._trace, _ACTIVE)
        return self.call(self.mlp.act, *_settled(args), **_settled(kwargs))

    def last(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if len(args) == 1 and not kwargs else None
        complete = _WHOLE if self.mlp.up or self.mlp.packed else _ACTIVE
        if type(given) is Deferred and given._stage == complete and not given._trace.values:
            given._trace.check()
            self.trace = None
            return self.whole(given._trace.x)
        return self.call(self.mlp.down, *_settled(args), **_settled(kwargs))


class _Site:
    """Called, it answers; everything else is asked of the layer."""

    def __init__(self, layer: Any, answer: Callable[..., Any]) -> None:
        self._layer, self._answer = layer, answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _stand_in(block: nn.Module, tree: dict[str, Any]) -> Any:
    """An object of a subclass of the block's class with the block's own attributes, but for those
    in `tree`."""
    sites = {}
    for name, answer in tree.items():
        if isinstance(answer, dict):
            module: Any = block._modules[name]
            inner = functools.partial(type(module).forward, _stand_in(module, answer))
            answer = _Site(module, inner)
        sites[name] = answer
    made = object.__new__(_stand_in_class(_stock(type(block)), tuple(sites)))
    object.__setattr__(made, "__dict__", block.__dict__)
    object.__setattr__(made, "_lora_kernels_sites", sites)
    return made


def _stock(cls: Any) -> Any:
    return getattr(cls, "stock", cls)


def _answer_of(name: str) -> Callable[[Any], Any]:
    return lambda self: self._lora_kernels_sites[name]


@functools.cache
def _stand_in_class(cls: Any, names: tuple[str, ...]) -> Any:
    members: dict[str, Any] = {name: property(_answer_of(name)) for name in names}
    members |= {
        "__slots__": ("_lora_kernels_sites",), "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }  # fmt: skip
    return type(cls.__name__, (cls,), members)


class Deferred:
    """A result that nobody computed yet. As an argument of a torch function, of an operator or
    asked for an attribute it is the tensor."""

    __slots__ = ("_stage", "_trace")

    def __init__(self, trace: _Trace, stage: str) -> None:
        self._trace, self._stage = trace, stage

    def _tensor(self) -> Tensor:
        return self._trace.value(self._stage)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = args[0] if args else None
        if (
            function is F.dropout
            and type(given) is Deferred
            and not (kwargs.get("training", True) and kwargs.get("p", 0.5) > 0.0)
        ):
            return given
        return function(*_settled(args), **_settled(kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor(), name)

    @property
    def dtype(self) -> torch.dtype:
        x = self._trace.x
        device = x.device.type
        autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
        return torch.get_autocast_dtype(device) if autocast else x.dtype

    @property
    def device(self) -> torch.device:
        return self._trace.x.device

    def chunk(self, chunks: int, dim: int = 0) -> Any:
        last = dim in (-1, self._trace.x.dim() - 1)
        if self._stage == _PACKED and chunks == 2 and last and not self._trace.values:
            return Deferred(self._trace, _GATE), Deferred(self._trace, _UP)
        return self._tensor().chunk(chunks, dim)

    def __mul__(self, other: Any) -> Any:
        if (
            type(other) is Deferred
            and other._trace is self._trace
            and {self._stage, other._stage} == {_ACTIVE, _UP}
            and not self._trace.values
        ):
            return Deferred(self._trace, _WHOLE)
        return self._tensor() * _settled(other)

    def __rmul__(self, other: Any) -> Any:
        return other * self._tensor()


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: Deferred, *args: Any) -> Any:
        return getattr(self._tensor(), name)(*_settled(args))

    return apply


_OPERATORS = """
    add radd sub rsub truediv rtruediv floordiv mod pow rpow matmul rmatmul neg pos abs eq ne lt le
    gt ge getitem setitem len iter bool float int index contains and or invert
"""
for _name in _OPERATORS.split():
    setattr(Deferred, f"__{_name}__", _operator(f"__{_name}__"))
Deferred.__hash__ = object.__hash__  # type: ignore[method-assign]


def _settled(found: Any) -> Any:
    """`found` with a tensor for every Deferred."""
    if type(found) is Deferred:
        return found._tensor()
    if isinstance(found, tuple) and not hasattr(found, "_fields"):
        return tuple(_settled(f) for f in found)
    if type(found) is list:
        return [_settled(f) for f in found]
    if type(found) is dict:
        return {k: _settled(f) for k, f in found.items()}
    return found


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
