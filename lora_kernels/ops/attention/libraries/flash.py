"""FlashAttention 2 as torch has it: aten::_flash_attention_forward and its backward.

q [B, S, H, D], or packed [T, H, D] with boundaries; both causal masks and windows are aligned
bottom-right, sides inclusive, -1 unlimited. lse is [B, H, S] or [H, T], natural, +inf for a row
that sees nothing. The operator of the backward reads torch's global flag for deterministic
algorithms, so that flag is set for the length of the call and put back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lora_kernels.ops.attention.libraries import form
from lora_kernels.ops.attention.libraries.here import Device, unknown_arguments
from lora_kernels.ops.attention.operands import Operands
from lora_kernels.ops.attention.problem import AttentionProblem

_forward = torch.ops.aten._flash_attention_forward.default
_backward = torch.ops.aten._flash_attention_backward.default
_flag = threading.RLock()
MAX_HEAD = 256


def limits(problem: AttentionProblem, direction: str, here: Device) -> str:
    if here.hip:
        return "not mapped to torch's kernels for AMD"
    if here.arch < (8, 0):
        return f"needs compute capability 8.0, this is {here.arch[0]}.{here.arch[1]}"
    if max(problem.D, problem.Dv) > MAX_HEAD:
        return f"heads are larger than {MAX_HEAD}"
    return unknown_arguments(
        _forward if direction == "fwd" else _backward, ("window_size_left", "window_size_right")
    )


def _shared(d: Operands, p: form.Packing | None) -> tuple[tuple[object, ...], dict[str, object]]:
    """(boundaries and lengths, keywords)."""
    left, right = form.reach(d, p)
    longest_q, longest_k = form.longest(d, p)
    # A longest sequence of one query makes the kernel fold a group's heads into its rows, which
    # supposes that every sequence has that one query.
    ends = (None, None) if p is None else (p.q, p.k)
    lengths = (longest_q, longest_k) if p is None else (max(longest_q, 2), longest_k)
    keywords: dict[str, object] = {
        "scale": d.scale,
        "window_size_left": left,
        "window_size_right": right,
    }
    return (*ends, *lengths, 0.0, (left, right) == (-1, 0)), keywords


def forward(d: Operands, p: form.Packing | None) -> tuple[Tensor, Tensor]:
    size = form.one_size(d)
    q, k, v = (form.rows(t, size) for t in (d.q, d.k, d.v))
    shared, keywords = _shared(d, p)
    out, lse, *_ = _forward(q, k, v, *shared, False, **keywords)
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, d: Operands, p: form.Packing | None, out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, their heads padded as the kernel has them."""
    size = form.one_size(d)
    dout, q, k, v, out = (form.rows(t, size) for t in (dout, d.q, d.k, d.v, out))
    shared, keywords = _shared(d, p)
    state = torch.zeros(
        2, dtype=torch.uint64, device=q.device
    )  # of dropout, of which there is none
    with deterministic_algorithms(d.deterministic):
        return _backward(
            dout, q, k, v, out, form.closed(lse), *shared, state, q.new_empty(0), **keywords
        )


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """torch's flag on for this block where it is `wanted`; never off, whatever is wanted."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if not wanted or before == (True, False):
        yield
        return
    with _flag:
        torch._C._set_deterministic_algorithms(True, warn_only=False)
        try:
            yield
        finally:
            torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
