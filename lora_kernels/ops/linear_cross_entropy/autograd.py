"""Gradient of linear_cross_entropy. Formulas: reference.py.

A mean or a sum is differentiated in the forward: its gradients up to one factor are known there,
and the logits are in hand. The factor arrives in the backward. Losses per token keep the hidden
states and make the logits again. No [M, V] tensor is ever saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops._differentiable_once import differentiable_once
from lora_kernels.ops.linear_cross_entropy import contract

_once = differentiable_once(
    "linear_cross_entropy", "compute the logits and torch.nn.functional.cross_entropy"
)


class ReducedLossFunction(torch.autograd.Function):
    """(coefficients, hidden, weight, lora_a, lora_b, bias, labels, options, backend) ->
    sum_i coefficients_i loss_i, fp32 (fp64 for fp64 inputs)."""

    @staticmethod
    def forward(
        ctx: Any, coefficients: Tensor, hidden: Tensor, weight: Tensor, lora_a: Tensor | None,
        lora_b: Tensor | None, bias: Tensor | None, labels: Tensor, options: tuple[Any, ...],
        backend: str,
    ) -> Tensor:  # fmt: skip
        needs = list(ctx.needs_input_grad[1:6])
        arguments = (hidden, weight, labels, lora_a, lora_b, bias, *options)
        ctx.needs = needs
        losses, grads = contract.grad(coefficients, *arguments, needs, backend)
        ctx.save_for_backward(*grads)
        return (losses * coefficients).sum()

    @staticmethod
    @_once
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = upstream
        scaled = [
            g * factor if need else None
            for g, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
        ]
        return None, *scaled, None, None, None


class TokenLossesFunction(torch.autograd.Function):
    """(hidden, weight, lora_a, lora_b, bias, labels, options, backend) -> losses [M]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None,
        bias: Tensor | None, labels: Tensor, options: tuple[Any, ...], backend: str,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(hidden, weight, labels, lora_a, lora_b, bias)
        ctx.options, ctx.backend = options, backend
        return contract.fwd(hidden, weight, labels, lora_a, lora_b, bias, *options, backend)

    @staticmethod
    @_once
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:5])
        _, grads = contract.grad(
            upstream[0].contiguous(), *ctx.saved_tensors, *ctx.options, needs, ctx.backend
        )
        kept = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return *kept, None, None, None
