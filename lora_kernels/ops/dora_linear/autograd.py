"""Gradient of dora_linear; the row norms are constants. Formulas: reference.py.

Saved: x, S [M, r], the norms, the parameters and the seed; P [M, N] too where the magnitude trains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops._differentiable_once import differentiable_once
from lora_kernels.ops.dora_linear import contract


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
    @differentiable_once("dora_linear", "write the adapted weight out")
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
