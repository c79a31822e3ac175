"""Gradient of quant_linear: dX through the quantized weight, dA, dB and the bias; W has none.

Saved: the parts of W (not W), x and S where there is an adapter, the parameters and the seed; no
mask, no dropped copy, no dequantized weight. Nothing saved is ever written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops._differentiable_once import differentiable_once
from lora_kernels.ops.quant_linear import contract

_once = differentiable_once(
    "quant_linear", "use torch.nn.functional.linear on the dequantized weight"
)


class QuantLinearFunction(torch.autograd.Function):
    """(x, bias, lora_a, lora_b, spec, scaling, dropout_p, seed, backend, run_time_scaling, *parts)
    -> (y, S)."""

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        spec: str,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
        backend: str,
        run_time_scaling: Tensor | None,
        *parts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return contract.fwd(
            x, list(parts), spec, bias, lora_a, lora_b, scaling, dropout_p, seed, backend,
            run_time_scaling,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, bias, lora_a, lora_b, spec, scaling, dropout_p, seed, backend, run_time, *parts = inputs
        s = output[1]
        ctx.mark_non_differentiable(s)
        kept = x if lora_a is not None else None
        ctx.save_for_backward(kept, lora_a, lora_b, s, seed, run_time, *parts)
        ctx.constants = spec, scaling, dropout_p, backend
        ctx.x_dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @_once
    def backward(ctx: Any, dy: Tensor, _ds: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_a, lora_b, s, seed, run_time, *parts = ctx.saved_tensors
        spec, scaling, dropout_p, backend = ctx.constants
        need_x, need_bias, need_a, need_b = ctx.needs_input_grad[:4]
        dy = dy if dy.dtype == ctx.x_dtype else dy.to(ctx.x_dtype)
        dx = da = db = None
        if need_x or need_a or need_b:
            dx, da, db = contract.bwd(
                dy, x, parts, spec, lora_a, lora_b, s, scaling, dropout_p, seed,
                need_x, need_a, need_b, backend, run_time,
            )  # fmt: skip
        return (
            dx if need_x else None,
            dy.sum(0, dtype=ctx.bias_dtype) if need_bias else None,
            da if need_a else None,
            db if need_b else None,
            *[None] * (6 + len(parts)),
        )
