"""Gradient of rms_norm. Saved: x, weight and rstd, no normalized copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops._differentiable_once import differentiable_once
from lora_kernels.ops.rms_norm import contract

_once = differentiable_once("rms_norm", "normalize with torch.nn.functional.rms_norm")


class RmsNormFunction(torch.autograd.Function):
    """(x, weight, eps, offset, backend, *lora_as) -> (y, s), all 2-D; s has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float, backend: str,
        *lora_as: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, rstd, s = contract.fwd(x, weight, list(lora_as), eps, offset, backend)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.backend = offset, backend
        ctx.mark_non_differentiable(s)
        return y, s

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx, dweight = contract.bwd(grads[0], x, weight, rstd, ctx.offset, needs[1], ctx.backend)
        rest = (None,) * (len(needs) - 2)
        return dx if needs[0] else None, dweight if needs[1] else None, *rest
