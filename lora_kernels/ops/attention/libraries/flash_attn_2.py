"""FlashAttention 2, the package flash_attn from 2.7 on, by the functions under its autograd.

q [B, S, H, D], or packed [T, H, D]; causal masks and windows are aligned bottom-right, sides
inclusive, -1 unlimited; lse is [B, H, S] or [H, T], natural, +inf for a row that sees nothing.
ALiBi under a causal mask adds slope * j instead of -slope * (i + o - j): the same softmax, and a
log-sum-exp that is slope * (i + o) higher, which is taken off here and put back for the backward.
The forward is deterministic, the backward by its flag. Source: Dao 2023, arXiv 2307.08691.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.attention.libraries import form
from lora_kernels.ops.attention.libraries.here import Device, load, unknown_arguments
from lora_kernels.ops.attention.operands import Operands
from lora_kernels.ops.attention.problem import AttentionProblem

PACKAGE = "flash_attn.flash_attn_interface"
MAX_HEAD = 256
_NAMES = ("window_size_left", "window_size_right", "softcap", "alibi_slopes")


def limits(problem: AttentionProblem, direction: str, here: Device) -> str:
    module, why = load(PACKAGE)
    if module is None:
        return why
    if here.hip:
        return "not mapped to the package for AMD"
    if here.arch < (8, 0):
        return f"needs compute capability 8.0, this is {here.arch[0]}.{here.arch[1]}"
    if max(problem.D, problem.Dv) > MAX_HEAD:
        return f"heads are larger than {MAX_HEAD}"
    stem = "_flash_attn_varlen_" if problem.varlen else "_flash_attn_"
    names = _NAMES if direction == "fwd" else (*_NAMES, "deterministic")
    step = getattr(module, stem + ("forward" if direction == "fwd" else "backward"), None)
    if step is None:
        return f"{PACKAGE} is older than 2.7"
    return unknown_arguments(step, names)


def _keywords(d: Operands, p: form.Packing | None) -> dict[str, Any]:
    left, right = form.reach(d, p)
    slopes = None if d.slopes is None else d.slopes.to(torch.float32).contiguous()
    if slopes is not None and slopes.shape[0] == 1:
        slopes = slopes[0]
    made: dict[str, Any] = {
        "dropout_p": 0.0, "softmax_scale": d.scale, "causal": (left, right) == (-1, 0),
        "window_size_left": left, "window_size_right": right, "softcap": d.softcap,
        "alibi_slopes": slopes,
    }  # fmt: skip
    if p is not None:
        # A longest sequence of one query makes the kernel fold a group's heads into its rows,
        # which supposes that every sequence has that one query.
        made |= {
            "cu_seqlens_q": p.q, "cu_seqlens_k": p.k, "max_seqlen_q": max(p.max_q, 2),
            "max_seqlen_k": p.max_k,
        }  # fmt: skip
    return made


def _shift(d: Operands, p: form.Packing | None) -> Tensor | None:
    """How much higher the package's log-sum-exp is than ours; None where it is not."""
    if d.slopes is None or form.reach(d, p) != (-1, 0):
        return None
    sequence, position = form.positions(d, p)
    slopes = d.slopes.to(torch.float32)
    if sequence is None:
        return slopes.unsqueeze(-1) * position
    slopes = slopes.expand(p.q.shape[0] - 1 if p is not None else 1, -1)
    return slopes[sequence].T * position


def forward(d: Operands, p: form.Packing | None) -> tuple[Tensor, Tensor]:
    size = form.one_size(d)
    q, k, v = (form.rows(t, size) for t in (d.q, d.k, d.v))
    module, _ = load(PACKAGE)
    step = module._flash_attn_forward if p is None else module._flash_attn_varlen_forward
    out, lse, *_ = step(q, k, v, **_keywords(d, p), return_softmax=False)
    shift = _shift(d, p)
    return out, lse if shift is None else lse - shift


def backward(
    dout: Tensor, dlse: Tensor | None, d: Operands, p: form.Packing | None, out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, their heads padded as the kernel has them."""
    size = form.one_size(d)
    dout, q, k, v, out = (form.rows(t, size) for t in (dout, d.q, d.k, d.v, out))
    shift = _shift(d, p)
    lse = form.closed(lse if shift is None else lse + shift)
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    module, _ = load(PACKAGE)
    step = module._flash_attn_backward if p is None else module._flash_attn_varlen_backward
    step(
        dout, q, k, v, out, lse, dq, dk, dv, **_keywords(d, p), deterministic=d.deterministic,
    )  # fmt: skip
    return dq, dk, dv
