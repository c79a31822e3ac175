"""Backward functions whose results refuse a second derivative, instead of being constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., "tuple[Tensor | None, ...]"]


class _RefuseSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, message: str) -> Tensor:
        ctx.message = message
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        raise NotImplementedError(ctx.message)


def differentiable_once(op: str, instead: str) -> Callable[[Backward], Backward]:
    """Decorator of a backward: with create_graph, gradients that raise when differentiated.

    torch's own once_differentiable lets them through as constants when the incoming gradient
    does not require one, which silently drops the term of a gradient penalty. `instead` says
    what to compute the layer with.
    """
    message = (
        f"{op}: second derivatives are not implemented; leave out create_graph=True, or {instead}"
    )

    def decorate(backward: Backward) -> Backward:
        def first_only(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                outputs = backward(ctx, *grads)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return outputs
            return tuple(
                None if t is None else _RefuseSecondDerivative.apply(t.requires_grad_(), message)
                for t in outputs
            )

        return first_only

    return decorate
