"""Gradient of lora_linear: one autograd node for a whole group. Formulas: reference.py.

Saved: x (shared by the group), S [M, sum of ranks] (a given one as it is), the parameters
and the seed; no mask, no dropped copy, no [M, N] tensor. Nothing saved is ever written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops._differentiable_once import differentiable_once
from lora_kernels.ops.lora_linear import contract

_once = differentiable_once("lora_linear", "compute this layer with torch.nn.functional.linear")


class LoraLinearFunction(torch.autograd.Function):
    """(x, seed, scalings, dropout_p, backend, run_time_scalings, shrunk, *weights, *lora_as,
    *lora_bs, *biases) -> (*ys, S). S is empty where `shrunk` is it; neither has a gradient."""

    @staticmethod
    def forward(
        x: Tensor,
        seed: Tensor | None,
        scalings: tuple[float, ...],
        dropout_p: float,
        backend: str,
        run_time_scalings: Tensor | None,
        shrunk: Tensor | None,
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        n = len(scalings)
        ys, s = contract.fwd(
            x, list(flat[:n]), list(flat[n : 2 * n]), list(flat[2 * n : 3 * n]),
            list(flat[3 * n :]), list(scalings), dropout_p, seed, backend, run_time_scalings,
            shrunk,
        )  # fmt: skip
        return (*ys, s)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, seed, scalings, dropout_p, backend, run_time_scalings, shrunk, *flat = inputs
        n = len(scalings)
        ctx.mark_non_differentiable(output[-1])
        s = output[-1] if shrunk is None else shrunk
        ctx.save_for_backward(x, s, seed, run_time_scalings, *flat[: 3 * n])
        ctx.scalings, ctx.dropout_p, ctx.backend = scalings, dropout_p, backend
        ctx.bias_dtypes = [None if b is None else b.dtype for b in flat[3 * n :]]

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, s, seed, run_time_scalings, *flat = ctx.saved_tensors
        n = len(ctx.scalings)
        weights, lora_as, lora_bs = flat[:n], flat[n : 2 * n], flat[2 * n :]
        needs = ctx.needs_input_grad
        need_w, need_a, need_b, need_bias = (needs[7 + i * n : 7 + (i + 1) * n] for i in range(4))
        dys = [g if g.dtype == x.dtype else g.to(x.dtype) for g in grads[:n]]
        dx: Tensor | None = None
        das: list[Tensor] = []
        dbs: list[Tensor] = []
        if needs[0] or any(need_a) or any(need_b):
            dx, das, dbs = contract.bwd(
                dys, x, weights, lora_as, lora_bs, s, list(ctx.scalings), ctx.dropout_p, seed,
                needs[0], any(need_a), any(need_b), ctx.backend, run_time_scalings,
            )  # fmt: skip
        dws = [(dy.t() @ x).to(w.dtype) if need else None
               for dy, w, need in zip(dys, weights, need_w, strict=True)]  # fmt: skip
        triples = zip(dys, ctx.bias_dtypes, need_bias, strict=True)
        dbiases = [dy.sum(0, dtype=d) if need else None for dy, d, need in triples]
        none = [None] * n
        return (
            dx if needs[0] else None, None, None, None, None, None, None,
            *dws,
            *(d if need else None for d, need in zip(das or none, need_a, strict=True)),
            *(d if need else None for d, need in zip(dbs or none, need_b, strict=True)),
            *dbiases,
        )  # fmt: skip
