"""Logits that are made only when somebody looks at them.

A causal language model hands its logits to the loss function and returns them. Where the loss
needs no logits, they would be made for nobody. `DeferredLogits` stands in for them: it knows its
shape, dtype and device, follows the scalar operations that models put between head and loss
(division, tanh, multiplication, conversion), and becomes the exact logits, gradient and all, at
any other use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_leaf")
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__,
}  # fmt: skip
_SCALE = {
    Tensor.mul: False, Tensor.__mul__: False, Tensor.__rmul__: False, torch.mul: False,
    Tensor.div: True, Tensor.__truediv__: True, torch.div: True, torch.true_divide: True,
}  # fmt: skip
_TANH = {torch.tanh, Tensor.tanh}


class DeferredLogits(Tensor):
    """``head(hidden)``, not computed yet.

    Attributes:
        head: the module whose forward gives the logits.
        hidden: ``[..., K]``.
        steps: what was done to the logits since, as ``("scale", factor)`` and ``("tanh", 0.0)``.
    """

    head: nn.Module
    hidden: Tensor
    steps: tuple[tuple[str, float], ...]
    _made: Tensor | None

    @staticmethod
    def __new__(
        cls, head: nn.Module, hidden: Tensor, shape: torch.Size, dtype: torch.dtype,
        steps: tuple[tuple[str, float], ...] = (),
    ) -> DeferredLogits:  # fmt: skip
        made = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=hidden.device, requires_grad=False
        )
        made.head, made.hidden, made.steps, made._made = head, hidden, steps, None
        return made

    def logits(self) -> Tensor:
        """The real ones, made once."""
        if self._made is None:
            made = type(self.head).forward(self.head, self.hidden)
            for step, factor in self.steps:
                made = torch.tanh(made) if step == "tanh" else made * factor
            self._made = made.to(_dtype(self))
        return self._made

    def after(self, step: str, factor: float) -> DeferredLogits:
        return DeferredLogits(
            self.head, self.hidden, _shape(self), _dtype(self), (*self.steps, (step, factor))
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        followed = _followed(func, args, kwargs)
        if followed is not None:
            return followed
        made = torch.utils._pytree.tree_map_only(DeferredLogits, DeferredLogits.logits, args)
        named = torch.utils._pytree.tree_map_only(DeferredLogits, DeferredLogits.logits, kwargs)
        return func(*made, **named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = torch.utils._pytree.tree_map_only(DeferredLogits, DeferredLogits.logits, args)
        return func(*made, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.logits())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.logits().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.logits().__deepcopy__(memo)


def _shape(deferred: Tensor) -> torch.Size:
    with torch._C.DisableTorchFunctionSubclass():
        return deferred.shape


def _dtype(deferred: Tensor) -> torch.dtype:
    with torch._C.DisableTorchFunctionSubclass():
        return deferred.dtype


def _followed(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> DeferredLogits | None:
    """The deferred result of a scalar operation; None where it is none of those."""
    if not args or not isinstance(args[0], DeferredLogits):
        return None
    first, rest = args[0], args[1:]
    if func is Tensor.float and not rest and not kwargs:
        return _converted(first, torch.float32)
    if func is Tensor.to and len(rest) == 1 and isinstance(rest[0], torch.dtype) and not kwargs:
        return _converted(first, rest[0])
    if func in _TANH and not rest and not kwargs:
        return first.after("tanh", 0.0)
    if func in _SCALE and len(rest) == 1 and not kwargs:
        factor = rest[0]
        if isinstance(factor, (int, float)) and not isinstance(factor, bool) and factor != 0:
            return first.after("scale", 1.0 / factor if _SCALE[func] else float(factor))
    return None


def _converted(deferred: DeferredLogits, dtype: torch.dtype) -> DeferredLogits | None:
    """Only to a wider type: what follows is then as exact as before."""
    if not dtype.is_floating_point or dtype.itemsize < _dtype(deferred).itemsize:
        return None
    return DeferredLogits(deferred.head, deferred.hidden, _shape(deferred), dtype, deferred.steps)
