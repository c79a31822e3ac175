"""FlashAttention 4 (CuTe DSL; Hopper and Blackwell), by the functions under its autograd.

Layouts and alignment as of FlashAttention 2, an unlimited side of the window is None; lse is
natural, -inf for a row that sees nothing, and its gradient is taken. The first call of a kind
compiles its kernel. The package: github.com/Dao-AILab/flash-attention, flash_attn/cute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.attention.libraries import form
from lora_kernels.ops.attention.libraries.here import Device, load, unknown_arguments
from lora_kernels.ops.attention.operands import Operands
from lora_kernels.ops.attention.problem import AttentionProblem

PACKAGE = "flash_attn.cute.interface"
_NAMES = ("softmax_scale", "causal", "softcap", "window_size_left", "window_size_right")
_HOPPER, _BLACKWELL = (9,), (10, 11)
_LATENT = (192, 128)  # heads of queries and of values that Blackwell's kernels take beside <= 128


def limits(problem: AttentionProblem, direction: str, here: Device) -> str:
    module, why = load(PACKAGE)
    if module is None:
        return why
    if here.hip or here.arch[0] not in (*_HOPPER, *_BLACKWELL):
        return f"for compute capability 9.x to 11.x, this is {here.arch[0]}.{here.arch[1]}"
    size = max(problem.D, problem.Dv)
    large = size > 128 and size != 256 and (problem.D, problem.Dv) != _LATENT
    if size > 256 or (large and here.arch[0] in _BLACKWELL):
        return "heads are larger than 128 and neither 256 nor 192 with values of 128"
    step = getattr(module, "_flash_attn_fwd" if direction == "fwd" else "_flash_attn_bwd", None)
    if step is None:
        return f"{PACKAGE} has other functions"
    also: tuple[str, ...] = ("return_lse",) if direction == "fwd" else ("deterministic",)
    if problem.lse_gradient:
        also = (*also, "dlse")
    return unknown_arguments(step, (*_NAMES, *also))


def _operands(d: Operands, *values: Tensor) -> tuple[Tensor, ...]:
    """q and k, then v and what is shaped like the output, padded."""
    one, own = form.one_size(d), (d.q.shape[-1], d.v.shape[-1])
    size_k, size_v = own if own == _LATENT else (one, one)
    return (
        *(form.rows(t, size_k) for t in (d.q, d.k)),
        *(form.rows(t, size_v) for t in (d.v, *values)),
    )


def _keywords(d: Operands, p: form.Packing | None) -> dict[str, Any]:
    left, right = (None if side < 0 else side for side in form.reach(d, p))
    made: dict[str, Any] = {
        "softmax_scale": d.scale, "causal": (left, right) == (None, 0), "softcap": d.softcap,
        "window_size_left": left, "window_size_right": right,
    }  # fmt: skip
    if p is not None:
        made |= {
            "cu_seqlens_q": p.q, "cu_seqlens_k": p.k, "max_seqlen_q": p.max_q,
            "max_seqlen_k": p.max_k,
        }  # fmt: skip
    return made


def forward(d: Operands, p: form.Packing | None) -> tuple[Tensor, Tensor]:
    module, _ = load(PACKAGE)
    out, lse, *_ = module._flash_attn_fwd(*_operands(d), **_keywords(d, p), return_lse=True)
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, d: Operands, p: form.Packing | None, out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, their heads padded as the kernel has them."""
    q, k, v, out, dout = _operands(d, out, dout)
    keywords = {**_keywords(d, p), "deterministic": d.deterministic}
    if dlse is not None:
        keywords["dlse"] = dlse.to(torch.float32).contiguous()
    # Zeros: of a packed sequence without queries or keys no block may write the other's gradient.
    made = {f"d{n}": torch.zeros_like(t) for n, t in zip("qkv", (q, k, v), strict=True)}
    module, _ = load(PACKAGE)
    dq, dk, dv, *_ = module._flash_attn_bwd(
        q, k, v, out, dout, lse.contiguous(), **keywords, **made
    )
    return dq, dk, dv
