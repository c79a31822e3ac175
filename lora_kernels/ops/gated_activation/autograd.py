"""Gradient of gated_activation. Saved: gate and up, nothing that can be computed from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops._differentiable_once import differentiable_once
from lora_kernels.ops.gated_activation import contract

_once = differentiable_once("gated_activation", "compute the activation with torch.nn.functional")


class GatedActivationFunction(torch.autograd.Function):
    """(gate, up, kind, backend) -> h, all 2-D."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, kind: str, backend: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.backend = kind, backend
        return contract.fwd(gate, up, kind, backend)

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = contract.bwd(grads[0], gate, up, ctx.kind, ctx.backend)
        needs = ctx.needs_input_grad
        return dgate if needs[0] else None, dup if needs[1] else None, None, None
