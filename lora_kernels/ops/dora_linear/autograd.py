"""Gradient of dora_linear; the row norms are constants. Formulas: reference.py.

Saved: x, S [M, r], the norms, the parameters and the seed; P [M, N] too where the magnitude trains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.dora_linear import contract

Backward = Callable[..., "tuple[Tensor | None, ...]"]


class _RefuseSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise NotImplementedError(
            "dora_linear: second derivatives are not implemented; leave out create_graph=True"
        )


def _differentiable_once(backward: Backward) -> Backward:
    """With create_graph, gradients that raise when they are differentiated."""

    def first_only(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return outputs
        return tuple(
            None if t is None else _RefuseSecondDerivative.apply(t.requires_grad_())
            for t in outputs
        )

    return first_only


class DoraLinearFunction(torch.autograd.Function):
    """(x, weight, lora_a, lora_b, magnitude, bias, scaling, dropout_p, seed, keep, backend) ->
    (Y, P, S, norm); all but Y are not differentiable."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        y, p, s, norm = contract.fwd(*args)
        return y, p, s, norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, lora_a, lora_b, magnitude, bias, scaling, dropout_p, seed, _, backend = inputs
        _, p, s, norm = output
        ctx.mark_non_differentiable(p, s, norm)
        ctx.save_for_backward(x, weight, lora_a, lora_b, magnitude, p, s, norm, seed)
        ctx.scaling, ctx.dropout_p, ctx.backend = scaling, dropout_p, backend
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, magnitude, p, s, norm, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dy = grads[0] if grads[0].dtype == x.dtype else grads[0].to(x.dtype)
        found: list[Tensor | None] = [None] * 5
        if any(needs[:5]):
            made = contract.bwd(
                dy, x, weight, lora_a, lora_b, magnitude, p, s, norm, ctx.scaling, ctx.dropout_p,
                seed, *needs[:5], ctx.backend,
            )  # fmt: skip
            found = [t if need else None for t, need in zip(made, needs[:5], strict=True)]
        dbias = dy.sum(0, dtype=ctx.bias_dtype) if needs[5] else None
        return (*found, dbias, None, None, None, None, None)
