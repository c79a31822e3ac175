"""Gradient of attention. Saved: operands, out and lse; no probability, no dropout mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops._differentiable_once import differentiable_once
from lora_kernels.ops.attention import contract

_once = differentiable_once("attention", "compute it with torch's softmax and matmul")


class AttentionFunction(torch.autograd.Function):
    """(q, k, v, sinks, attn_mask, cu_seqlens, cu_seqlens_k, alibi_slopes, seed, options, backend,
    return_lse) -> (out, lse); lse is differentiable where it is returned to the caller."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
        attn_mask: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None,
        alibi_slopes: Tensor | None, seed: Tensor | None, options: tuple[Any, ...], backend: str,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        tensors = (q, k, v, sinks, attn_mask, cu_seqlens, cu_seqlens_k, alibi_slopes, seed)
        out, lse = contract.fwd(*tensors, *options, backend)
        ctx.save_for_backward(out, lse, *tensors)
        ctx.options, ctx.backend, ctx.return_lse = options, backend, return_lse
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @_once
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        dout, dlse = upstream
        if dout is None:
            dout = torch.zeros_like(out)
        if not ctx.return_lse:  # a compiled graph materializes it all the same
            dlse = None
        needs = list(ctx.needs_input_grad[:5])
        grads = contract.bwd(
            dout.to(out.dtype), dlse, out, lse, *tensors, *ctx.options, needs, ctx.backend
        )
        kept = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return *kept, None, None, None, None, None, None, None
