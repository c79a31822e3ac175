"""Gradient of gated_activation. Saved: gate and up, nothing that can be computed from them.

S is a value that a layer behind H would compute itself; its gradient is that layer's business.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops._differentiable_once import differentiable_once
from lora_kernels.ops.gated_activation import contract

_once = differentiable_once("gated_activation", "compute the activation with torch.nn.functional")


class GatedActivationFunction(torch.autograd.Function):
    """(gate, up, kind, backend, *lora_as) -> (h, s), all 2-D; s without a gradient."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor | None, kind: str, backend: str, *lora_as: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.backend = kind, backend
        h, s = contract.fwd(gate, up, kind, list(lora_as), backend)
        ctx.mark_non_differentiable(s)
        return h, s

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup, _, _ = contract.bwd(grads[0], gate, up, ctx.kind, [], None, [], ctx.backend)
        needs = ctx.needs_input_grad
        rest = [None] * (len(needs) - 2)
        return dgate if needs[0] else None, dup if needs[1] else None, *rest
