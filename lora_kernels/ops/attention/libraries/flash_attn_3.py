"""FlashAttention 3 (Hopper), by the operators that flash_attn_interface registers.

Called as torch.ops.flash_attn_3.fwd and bwd with keywords, whose names outlived changes of the
Python functions around them. Layouts, alignment and log-sum-exp as of FlashAttention 2; no ALiBi;
gradients are written into tensors that are handed in. Deterministic by its flag, up to heads of
192. Source: Shah et al. 2024, arXiv 2407.08608.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.attention.libraries import form
from lora_kernels.ops.attention.libraries.here import Device, load, unknown_arguments
from lora_kernels.ops.attention.operands import Operands
from lora_kernels.ops.attention.problem import AttentionProblem

PACKAGE = "flash_attn_interface"
MAX_HEAD, MAX_DETERMINISTIC_HEAD = 256, 192
_NAMES = ("softmax_scale", "is_causal", "window_size_left", "window_size_right", "softcap")


def _operators() -> Any:
    return torch.ops.flash_attn_3


def limits(problem: AttentionProblem, direction: str, here: Device) -> str:
    module, why = load(PACKAGE)
    if module is None:
        return why
    if here.hip or here.arch[0] != 9:
        return f"for compute capability 9.x, this is {here.arch[0]}.{here.arch[1]}"
    size = max(problem.D, problem.Dv)
    if size > MAX_HEAD:
        return f"heads are larger than {MAX_HEAD}"
    if direction == "bwd" and problem.deterministic and size > MAX_DETERMINISTIC_HEAD:
        return f"no deterministic backward for heads larger than {MAX_DETERMINISTIC_HEAD}"
    try:
        step = _operators().fwd.default if direction == "fwd" else _operators().bwd.default
    except AttributeError:
        return f"{PACKAGE} registers no operators flash_attn_3"
    names = (*_NAMES, "num_splits") if direction == "fwd" else (*_NAMES, "deterministic", "dq")
    return unknown_arguments(step, names)


def _keywords(d: Operands, p: form.Packing | None) -> dict[str, Any]:
    left, right = form.reach(d, p)
    made: dict[str, Any] = {
        "softmax_scale": d.scale, "is_causal": (left, right) == (-1, 0), "window_size_left": left,
        "window_size_right": right, "softcap": d.softcap,
    }  # fmt: skip
    if p is not None:
        made |= {
            "cu_seqlens_q": p.q, "cu_seqlens_k": p.k, "max_seqlen_q": p.max_q,
            "max_seqlen_k": p.max_k,
        }  # fmt: skip
    return made


def forward(d: Operands, p: form.Packing | None) -> tuple[Tensor, Tensor]:
    size = form.one_size(d)
    q, k, v = (form.rows(t, size) for t in (d.q, d.k, d.v))
    out, lse, *_ = _operators().fwd.default(q, k, v, **_keywords(d, p), num_splits=1)
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, d: Operands, p: form.Packing | None, out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, their heads padded as the kernel has them."""
    size = form.one_size(d)
    dout, q, k, v, out = (form.rows(t, size) for t in (dout, d.q, d.k, d.v, out))
    # Zeros: of a packed sequence without queries or keys no block may write the other's gradient.
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    _operators().bwd.default(
        dout, q, k, v, out, form.closed(lse), dq=dq, dk=dk, dv=dv, **_keywords(d, p),
        deterministic=d.deterministic,
    )  # fmt: skip
    return dq, dk, dv
