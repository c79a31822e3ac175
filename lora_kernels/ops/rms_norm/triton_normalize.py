# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton concatenates tuples, it does not unpack them.
"""The norm, and the shrink of its result while that is in registers.

Math       rstd = 1 / sqrt(mean_k(x^2) + eps);  y = x rstd (offset + w), rounded to T;
           S_j = y A_j^T of the rounded y
Shapes     x [M, K], w [K] and A_j [r_j, K] in any strides; y [M, K], rstd [M] (fp32) and
           S [M, sum r_j] contiguous
Grid       (ceil(M / BM)): a program owns BM rows and holds the sums of all members, [G][BM, RP], in
           registers. WHOLE: a row is one tile, which stays in registers. Else two walks over K, the
           first for rstd; the rows of a program are few enough to be found in L2 by the second.
           NORMALIZE off: x is a y that was made before; the shrink of members that did not fit.
Bytes      x read and y written (4 M K for bf16), x again from L2, A once per BM rows from L2, S
           once. A pass over y is saved (2 M K).
Numerics   fp32; y rounded once, and the rounded y is the multiplicand, as for who reads y. S sums
           in fp32, rounded once. Bitwise reproducible.
Limits     G * RP <= 256 by registers; ranks are padded to RP with zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gain_of(weight, k, K, sw, offset, WEIGHTED: tl.constexpr):
    """offset + w in fp32, [1, len(k)]; 1 without a weight."""
    if WEIGHTED:
        w = tl.load(weight + k.to(tl.int64) * sw, mask=k < K, other=0.0)
        gain = w.to(tl.float32) + offset
    else:
        gain = tl.full(k.shape, 1.0, tl.float32)
    return gain[None, :]


@triton.jit(do_not_specialize=["M", "total_rank", "first_column", "eps", "offset"])
def normalize(
    x, weight, y, rstd_out, a_ptrs, s, M, K, total_rank, first_column, ranks, sxm, sxk, sw, sars,
    saks, eps, offset,
    G: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
    NORMALIZE: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    there = tl.where(rows < M, rows, 0).to(tl.int64)[:, None]  # a row that exists: no mask
    outside = (rows < M)[:, None]
    x_rows, y_rows = x + there * sxm, y + there * K
    dtype = x.dtype.element_ty
    r = tl.arange(0, RP)
    if NORMALIZE and WHOLE:
        k = tl.arange(0, BK)
        held = tl.load(x_rows + k.to(tl.int64)[None, :] * sxk, mask=(k < K)[None, :], other=0.0)
        held = held.to(tl.float32)
        squares = held * held
    elif NORMALIZE:
        squares = tl.zeros((BM, BK), tl.float32)
        for first in tl.range(0, K, BK):
            k = first + tl.arange(0, BK)
            tile = tl.load(x_rows + k.to(tl.int64)[None, :] * sxk, mask=(k < K)[None, :], other=0.0)
            wide = tile.to(tl.float32)
            squares += wide * wide
    if NORMALIZE:
        rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / K + eps)
        tl.store(rstd_out + rows, rstd, mask=rows < M)
        rstd = rstd[:, None]
    sums = ()
    for _ in tl.static_range(G):
        sums = sums + (tl.zeros((BM, RP), tl.float32),)
    for first in tl.range(0, K, BK):
        k = first + tl.arange(0, BK)
        inside = (k < K)[None, :]
        if WHOLE and NORMALIZE:
            wide = held
        else:
            tile = tl.load(x_rows + k.to(tl.int64)[None, :] * sxk, mask=inside, other=0.0)
            wide = tile.to(tl.float32)
        if NORMALIZE:
            value = wide * rstd * gain_of(weight, k, K, sw, offset, WEIGHTED)
            tile = value.to(dtype)
            tl.store(y_rows + k.to(tl.int64)[None, :], tile, mask=inside & outside)
        if G > 0:
            # Zero already where masked. Without a select here the compiler computes y in the
            # layout of the operand, several times over.
            operand = tl.where(inside, tile, 0.0).to(dtype)
        added = ()
        for j in tl.static_range(G):
            own = a_ptrs[j] + k.to(tl.int64)[:, None] * saks[j] + r[None, :] * sars[j]
            a = tl.load(own, mask=(k < K)[:, None] & (r < ranks[j])[None, :], other=0.0)
            if a.dtype != dtype:
                a = a.to(tl.float32).to(dtype)
            added = added + (tl.dot(operand, a, sums[j], input_precision=PRECISION),)
        sums = added
    out = s + rows.to(tl.int64)[:, None] * total_rank
    column = first_column
    for j in tl.static_range(G):
        value = sums[j].to(s.dtype.element_ty)
        tl.store(out + (column + r)[None, :], value, mask=outside & (r < ranks[j])[None, :])
        column += ranks[j]
