"""Gradient of rope: the transposed rotation of the gradients. Saved: cos, sin and positions.

The op is linear, so its backward is differentiated by itself, any number of times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.rope import contract


class RopeFunction(torch.autograd.Function):
    """(cos, sin, position_ids, interleaved, inverse, backend, *heads) -> heads rotated."""

    @staticmethod
    def forward(
        ctx: Any, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool,
        inverse: bool, backend: str, *heads: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.interleaved, ctx.inverse, ctx.backend = interleaved, inverse, backend
        run = contract.bwd if inverse else contract.fwd
        return tuple(run(list(heads), cos, sin, position_ids, interleaved, backend))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, position_ids = ctx.saved_tensors
        none = (None,) * 6
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            again = RopeFunction.apply(
                cos, sin, position_ids, ctx.interleaved, not ctx.inverse, ctx.backend, *grads
            )
            return *none, *again
        run = contract.fwd if ctx.inverse else contract.bwd
        return *none, *run(list(grads), cos, sin, position_ids, ctx.interleaved, ctx.backend)
