"""rms_norm on Triton kernels: which launches, with which tiles, into which buffers.

    forward   one launch that writes y and rstd and, with adapters, sums S beside them
    backward  one launch for dx and the partial sums of dweight, one that adds those

The inputs may have any strides; nothing is copied, and nothing waits for the device. CPU tensors
run in Triton's interpreter when TRITON_INTERPRET=1 was set before the first launch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels._backends import triton as backend
from lora_kernels.ops.rms_norm import triton_tiles as tiles
from lora_kernels.ops.rms_norm.problem import RmsNormProblem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_device = backend.processors
_SUM_BLOCK, _SUM_ROWS = 64, 16


def supports(problem: RmsNormProblem) -> tuple[bool, str]:
    """Can the kernels run `problem`, at whatever speed; the reason is for people."""
    able, reason = backend.usable(problem.device, None, "x")
    if not able:
        return False, reason
    for name, dtype in (("x", problem.dtype), ("weight", problem.weight_dtype)):
        if dtype is not None and dtype not in _DTYPES:
            return False, f"{name} in {dtype} is not supported; float32, bfloat16 and float16 are"
    if max(problem.M, problem.K) >= 2**31 - 2**16:
        return False, "an extent of about 2**31 or more is not supported"
    return True, reason


class _Kernels(NamedTuple):
    normalize: Any
    gradients: Any
    sum_partials: Any


@functools.cache
def _kernels() -> _Kernels:
    from lora_kernels.ops import _triton_partial_sums
    from lora_kernels.ops.rms_norm import triton_gradients, triton_normalize

    return _Kernels(
        triton_normalize.normalize, triton_gradients.gradients, _triton_partial_sums.sum_partials
    )


def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, lora_as: list[Tensor], eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Y [M, K] in the dtype of x, rstd [M] in fp32, S [M, sum of ranks] in the dtype of x."""
    (m, k), (processors, amd), size = x.shape, _device(x), x.dtype.itemsize
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = x.new_empty(m, dtype=torch.float32)
    s = x.new_empty(m, sum(a.shape[0] for a in lora_as))
    lora_as = [part for a in lora_as for part in a.split(tiles.widest(size))]
    ranks = tuple(a.shape[0] for a in lora_as)
    with backend.on_device(x), backend.arithmetic(_kernels().normalize):
        if s.shape[1] == 0:
            _normalize(x, weight, y, rstd, [], s, 0, eps, offset, tiles.plain(k))
            return y, rstd, s
        for first, last in tiles.launches(ranks, size):
            members = lora_as[first:last]
            total = len(members) * tiles.padded_rank(max(ranks[first:last]))
            tile = tiles.shrink(m, k, total, size, processors, amd)
            # Members that did not fit beside the first are shrunk from y.
            given = rstd if first == 0 else None
            _normalize(
                x if first == 0 else y, weight, y, given, members, s, sum(ranks[:first]), eps,
                offset, tile,
            )  # fmt: skip
    return y, rstd, s


def _normalize(
    x: Tensor, weight: Tensor | None, y: Tensor, rstd: Tensor | None, lora_as: list[Tensor],
    s: Tensor, first_column: int, eps: float, offset: float, tile: tiles.Tile,
) -> None:  # fmt: skip
    """Without rstd: the shrink of x alone."""
    (m, k), ranks, members = x.shape, tuple(a.shape[0] for a in lora_as), lora_as or [x]
    _kernels().normalize[(-(-m // tile.rows),)](
        x, x if weight is None else weight, y, x if rstd is None else rstd, tuple(members), s, m, k,
        s.shape[1], first_column, ranks or (0,), *x.stride(),
        0 if weight is None else weight.stride(0), tuple(a.stride(0) for a in members),
        tuple(a.stride(1) for a in members), eps, offset,
        G=len(lora_as), RP=tiles.padded_rank(max(ranks, default=1)), BM=tile.rows, BK=tile.columns,
        WHOLE=tile.whole, NORMALIZE=rstd is not None, WEIGHTED=weight is not None,
        PRECISION=backend.precision(x.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, need_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """dX [M, K] in the dtype of x; dW [K] in that of weight, None where it is not needed."""
    m, k = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = None
    if weight is not None and need_dweight:
        dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    tile = tiles.gradients(m, k, _device(x)[0])
    programs = -(-m // tile.per_program)
    part = x.new_empty((0, k) if dweight is None else (programs, k), dtype=torch.float32)
    with backend.on_device(x), backend.arithmetic(_kernels().gradients):
        _kernels().gradients[(programs,)](
            dy, x, x if weight is None else weight, rstd.contiguous(), dx, part, m, k, *dy.stride(),
            *x.stride(), 0 if weight is None else weight.stride(0), offset, tile.per_program,
            BM=tile.rows, BK=tile.columns, WHOLE=tile.whole, WEIGHTED=weight is not None,
            NEED_DW=dweight is not None, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if dweight is not None:
            _kernels().sum_partials[(-(-k // _SUM_BLOCK),)](
                (part,), (dweight,), (programs,), (k,), (0,),
                G=1, P=_SUM_ROWS, BLOCK=_SUM_BLOCK, num_warps=4,
            )  # fmt: skip
    return dx, dweight
