"""torch's FlexAttention: scores and masks as functions that are compiled into the kernel.

Packed sequences are one batch of one, a query and a key see each other where their sequences are
the same. The log-sum-exp is natural and has a gradient. The kernels of the backward add without
atomics; they come with the forward's autograd, so the forward is computed once more. On a CPU the
functions run uncompiled, which is for tests: all scores are made.
Source: Dong et al. 2024, arXiv 2412.05496.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.ops.attention.libraries import form
from lora_kernels.ops.attention.libraries.here import Device, load, unknown_arguments
from lora_kernels.ops.attention.operands import Operands
from lora_kernels.ops.attention.problem import AttentionProblem

PACKAGE = "torch.nn.attention.flex_attention"
LEAST_HEAD, MAX_HEAD = 16, 256


def limits(problem: AttentionProblem, direction: str, here: Device) -> str:
    module, why = load(PACKAGE)
    if module is None:
        return why
    if not hasattr(module, "AuxRequest"):
        return f"torch {torch.__version__} has no log-sum-exp of FlexAttention on request"
    if max(problem.D, problem.Dv) > MAX_HEAD:
        return f"heads are larger than {MAX_HEAD}"
    return unknown_arguments(module.flex_attention, ("score_mod", "block_mask", "return_aux"))


@functools.cache
def _kernel(compiled: bool) -> Callable[..., Any]:
    function = load(PACKAGE)[0].flex_attention
    return torch.compile(function) if compiled else function


def _places(d: Operands, p: form.Packing | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequence and position of each query, and of each key."""
    device = d.q.device
    sequence, at = form.positions(d, p)
    if p is None or sequence is None:
        key = torch.arange(d.k.shape[1], device=device)
        return torch.zeros_like(at), at, torch.zeros_like(key), key
    row = torch.arange(d.k.shape[0], device=device, dtype=torch.int32)
    b = torch.searchsorted(p.k, row, right=True) - 1
    return sequence, at, b, row - p.k[b]


def _functions(d: Operands, p: form.Packing | None) -> tuple[Any, Any]:
    """(score function or None, mask function or None)."""
    left, right = form.reach(d, p)
    q_sequence, q_at, k_sequence, k_at = _places(d, p)
    softcap, mask, slopes = d.softcap, d.mask, d.slopes
    if mask is not None:
        full = (d.q.shape[0], d.q.shape[2], d.q.shape[1], d.k.shape[1])
        mask = mask.expand(full)
    if slopes is not None:
        slopes = slopes.to(torch.float32).expand(
            p.q.shape[0] - 1 if p is not None else d.q.shape[0], -1
        )
    hides = mask is not None and mask.dtype == torch.bool
    adds = mask is not None and not hides

    def score(z: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        if slopes is not None:
            row = q_sequence[i] if p is not None else b
            z = z - slopes[row, h] * (q_at[i] - k_at[j]).abs()
        return z + mask[b, h, i, j] if adds and mask is not None else z

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        inside = q_sequence[i] == k_sequence[j]
        if left >= 0:
            inside = inside & (k_at[j] >= q_at[i] - left)
        if right >= 0:
            inside = inside & (k_at[j] <= q_at[i] + right)
        return inside & mask[b, h, i, j] if hides and mask is not None else inside

    scored = bool(softcap) or slopes is not None or adds
    return score if scored else None, seen if p or hides or (left, right) != (-1, -1) else None


def _run(d: Operands, p: form.Packing | None, named: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    module = load(PACKAGE)[0]
    q, k, v = (t.unsqueeze(0) if p is not None else t for t in named)
    size = max(LEAST_HEAD, form.round_up(q.shape[-1], 8))
    size_v = max(LEAST_HEAD, form.round_up(v.shape[-1], 8))
    q, k = (F.pad(t, (0, size - t.shape[-1])).transpose(1, 2) for t in (q, k))
    v = F.pad(v, (0, size_v - v.shape[-1])).transpose(1, 2)
    on_gpu = q.is_cuda
    score, seen = _functions(d, p)
    block_mask = None
    if seen is not None:
        hides = d.mask is not None and d.mask.dtype == torch.bool
        batch, heads = (q.shape[0], q.shape[1]) if hides else (None, None)
        block_mask = module.create_block_mask(
            seen, batch, heads, q.shape[2], k.shape[2], device=str(q.device), _compile=on_gpu
        )
    out, extra = _kernel(on_gpu)(
        q, k, v, score_mod=score, block_mask=block_mask, scale=d.scale,
        enable_gqa=q.shape[1] != k.shape[1], return_aux=module.AuxRequest(lse=True),
    )  # fmt: skip
    out, lse = out.transpose(1, 2), extra.lse
    return (out, lse) if p is None else (out[0], lse[0])


def forward(d: Operands, p: form.Packing | None) -> tuple[Tensor, Tensor]:
    return _run(d, p, (d.q, d.k, d.v))


def backward(
    dout: Tensor, dlse: Tensor | None, d: Operands, p: form.Packing | None, out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, through a second forward and its autograd, sinks included."""
    leaves = tuple(t.detach().requires_grad_() for t in (d.q, d.k, d.v))
    with torch.enable_grad():
        again, again_lse = _run(d, p, leaves)
        again = again[..., : d.v.shape[-1]]
        if d.sinks is not None:
            sinks = d.sinks.detach().to(again_lse.dtype).view(-1, 1)
            total = torch.logaddexp(again_lse, sinks)
            share = torch.exp(again_lse - total)
            again, again_lse = again * share.transpose(-1, -2).unsqueeze(-1), total
    seen = again_lse != -torch.inf
    slope = torch.zeros_like(again_lse) if dlse is None else dlse.to(again_lse.dtype)
    dq, dk, dv = torch.autograd.grad(
        (again, again_lse), leaves, (dout.to(again.dtype), slope.masked_fill(~seen, 0.0))
    )
    return dq, dk, dv
