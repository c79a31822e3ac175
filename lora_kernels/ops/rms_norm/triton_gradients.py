# mypy: ignore-errors
"""Gradients of the norm: dx, and dweight from the same pass.

Math       n = x rstd,  d = dy (offset + w);  dx = rstd (d - n mean_k(d n));  dw = sum_m(dy n)
Shapes     dy, x [M, K], w [K] in any strides; rstd [M] fp32; dx [M, K] contiguous; partial sums of
           dw in fp32, [programs, K]
Grid       a program walks over its rows, BM at a time, and keeps its share of dw: in registers if
           a row is one tile (WHOLE), else in its own row of the partial sums.
Bytes      dy and x read, dx written (6 M K for bf16); where a row is not one tile, dy and x again
           from L2. Partial sums 8 K per program.
Numerics   fp32; dx and dw rounded once. Bitwise reproducible on a device: the rows of a program
           follow from M and the number of multiprocessors.
Limits     none beyond 32-bit extents.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.ops.rms_norm.triton_normalize import gain_of


@triton.jit
def _pair(dy, x, k, K, sdk, sxk, rstd, there):
    """dy and the normalized x in fp32."""
    inside = there & (k < K)[None, :]
    k64 = k.to(tl.int64)[None, :]
    grad = tl.load(dy + k64 * sdk, mask=inside, other=0.0).to(tl.float32)
    normal = tl.load(x + k64 * sxk, mask=inside, other=0.0).to(tl.float32) * rstd
    return grad, normal


@triton.jit(do_not_specialize=["M", "offset", "rows_per_program"])
def gradients(
    dy, x, weight, rstd_in, dx, dw, M, K, sdm, sdk, sxm, sxk, sw, offset, rows_per_program,
    BM: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr, WEIGHTED: tl.constexpr,
    NEED_DW: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, M)
    dtype = x.dtype.element_ty
    dw += program.to(tl.int64) * K
    column = tl.arange(0, BK)
    if WHOLE:
        gain = gain_of(weight, column, K, sw, offset, WEIGHTED)
        share = tl.zeros((BM, BK), tl.float32)
    for row in tl.range(first, last, BM):
        m = row + tl.arange(0, BM)
        there = (m < last)[:, None]
        m64 = m.to(tl.int64)[:, None]
        dy_rows, x_rows, dx_rows = dy + m64 * sdm, x + m64 * sxm, dx + m64 * K
        rstd = tl.load(rstd_in + m, mask=m < last, other=0.0)[:, None]
        if WHOLE:
            grad, normal = _pair(dy_rows, x_rows, column, K, sdk, sxk, rstd, there)
            d = grad * gain
            mean = tl.sum(d * normal, axis=1)[:, None] / K
            value = ((d - normal * mean) * rstd).to(dtype)
            tl.store(dx_rows + column[None, :], value, mask=there & (column < K)[None, :])
            if NEED_DW:
                share += grad * normal
        else:
            total = tl.zeros((BM, BK), tl.float32)
            for begin in tl.range(0, K, BK):
                k = begin + column
                grad, normal = _pair(dy_rows, x_rows, k, K, sdk, sxk, rstd, there)
                total += grad * gain_of(weight, k, K, sw, offset, WEIGHTED) * normal
            mean = tl.sum(total, axis=1)[:, None] / K
            tl.debug_barrier()  # the shares of the rows before are read again
            for begin in tl.range(0, K, BK):
                k = begin + column
                grad, normal = _pair(dy_rows, x_rows, k, K, sdk, sxk, rstd, there)
                d = grad * gain_of(weight, k, K, sw, offset, WEIGHTED)
                value = ((d - normal * mean) * rstd).to(dtype)
                tl.store(
                    dx_rows + k.to(tl.int64)[None, :], value, mask=there & (k < K)[None, :]
                )  # fmt: skip
                if NEED_DW:
                    before = tl.load(dw + k, mask=(k < K) & (row > first), other=0.0)
                    tl.store(dw + k, before + tl.sum(grad * normal, axis=0), mask=k < K)
    if WHOLE and NEED_DW:
        tl.store(dw + column, tl.sum(share, axis=0), mask=column < K)
