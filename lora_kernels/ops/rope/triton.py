"""rope on a Triton kernel: one launch for q and k, either way.

The inputs may have any strides; nothing is copied. Nothing here waits for the device. CPU tensors
run in Triton's interpreter when TRITON_INTERPRET=1 was set before the first launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels._backends import triton as backend
from lora_kernels.ops.rope.problem import RopeProblem

_CHANNELS = 4096  # of a program: a few loads per thread in flight
_MAX_HEAD = 4096


def supports(problem: RopeProblem) -> tuple[bool, str]:
    """Can the kernel run `problem`, at whatever speed; the reason is for people."""
    able, reason = backend.usable(problem.device, None, "q")
    if not able:
        return False, reason
    if problem.D > _MAX_HEAD:
        return False, f"a head of {problem.D} is too large; at most {_MAX_HEAD}"
    if problem.B * problem.S >= 2**31:
        return False, "2**31 positions or more are not supported"
    return True, reason


def _kernel() -> Any:
    from lora_kernels.ops.rope import triton_rotate

    return triton_rotate.rotate


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _batched(t: Tensor, dims: int) -> tuple[int, ...]:
    """Strides with that of the batch first; 0 where there is no batch, or it is shared."""
    strides = t.stride() if t.dim() == dims else (0, *t.stride())
    return (0, *strides[1:]) if t.dim() == dims and t.shape[0] == 1 else strides


def _rotate(
    heads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, inverse: bool,
) -> list[Tensor]:  # fmt: skip
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in heads]
    q, R = heads[0], cos.shape[-1]
    S, D = q.shape[-3], q.shape[-1]
    places = S * (q.shape[0] if q.dim() == 4 else 1)
    counts = tuple(x.shape[-2] for x in heads)
    if places == 0 or sum(counts) == 0:
        return outs
    pairs, rest = _power(R // 2), D - R
    block = min(_power(max(counts)), max(1, _CHANNELS // (2 * pairs)))
    firsts = [0]
    for count in counts:
        firsts.append(firsts[-1] + -(-count // block))
    strides = [x.stride() if x.dim() == 4 else (0, *x.stride()) for x in heads]
    ids = q if position_ids is None else position_ids
    kernel = _kernel()
    with backend.on_device(q), backend.arithmetic(kernel):
        kernel[(places, firsts[-1])](
            tuple(heads), tuple(outs), cos, sin, ids, S, cos.shape[0], counts, tuple(firsts), D, R,
            *(tuple(s[axis] for s in strides) for axis in range(4)),
            *_batched(cos, 3), *_batched(sin, 3),
            *((0, 0) if position_ids is None else _batched(ids, 2)),
            G=len(heads), HB=block, PAIRS=pairs, REST=_power(rest) if rest else 0,
            INTERLEAVED=interleaved, INVERSE=inverse, HAS_IDS=position_ids is not None,
            WIDE=q.dtype == torch.float64, num_warps=4,
        )  # fmt: skip
    return outs


def rope_fwd(
    heads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> list[Tensor]:
    """Every tensor of heads [..., S, H, D] rotated."""
    return _rotate(heads, cos, sin, position_ids, interleaved, False)


def rope_bwd(
    grads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> list[Tensor]:
    """Gradients of heads from those of the results."""
    return _rotate(grads, cos, sin, position_ids, interleaved, True)
