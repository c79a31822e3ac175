# mypy: ignore-errors
"""A LoRA projection whose heads leave the accumulators rotated.

Math       Y = X W^T + scale S B^T + bias;  of a rotated pair of channels
           z1 = y1 cos_1 - y2 sin_1,  z2 = y2 cos_2 + y1 sin_2
Shapes     X [M, K], W [N, K], S [M, r], B [N, r], bias [N], any strides; Z [M, N] contiguous. Row m
           is position m % S of sequence m / S.
Grid       a program has BM rows and BP pairs of columns, in groups of GROUP_M tile rows.
Pairs      The two columns of a pair lie R / 2 (half-rotated), 1 (interleaved) or, past the R
           rotated channels, (D - R) / 2 apart. A program reads the rows of W that are first and
           those that are second of its pairs as two operands, and keeps two accumulators: partners
           then sit in the same place of two tiles of one layout, and no tile has to hold whole
           heads. So D has to be even, no power of two, and threads exchange nothing.
Bytes      those of the projection, plus cos and sin of the rows; z is written once. As a call of
           its own, the rotation would read and write q and k once more.
Numerics   fp32 accumulators for base, update and bias, the rotation in fp32, one rounding at the
           store. The update comes first and is scaled in fp32: fp16 does not leave its range.
           Bitwise reproducible. A position outside of the cache gives NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows_of(t, column, k, inside, K, stride_n, stride_k, EVEN_K: tl.constexpr):
    """[BK, BP]: rows `column` of W or B, transposed."""
    pointers = t + column.to(tl.int64)[None, :] * stride_n + k.to(tl.int64)[:, None] * stride_k
    if EVEN_K:
        return tl.load(pointers, mask=inside[None, :], other=0.0)
    return tl.load(pointers, mask=inside[None, :] & (k < K)[:, None], other=0.0)


@triton.jit
def _table(t, row, channel, known, stride, mask, one):
    """[BM, BP] of cos (one = 1) or sin (one = 0); `one` where nothing is rotated."""
    found = tl.load(
        t + row[:, None] + channel.to(tl.int64)[None, :] * stride, mask=mask, other=one
    ).to(tl.float32)
    return tl.where(known[:, None] | (mask == 0), found, float("nan"))


@triton.jit(do_not_specialize=["M", "S", "positions", "scale"])
def project(
    x, w, s, b, bias, cos, sin, ids, y, M, N, K, rank, S, positions, D, R, turned, scale,
    xm, xk, wn, wk, sm, sr, bn, br, bias_stride, cb, cn, cr, zb, zn, zr, ib, in_,
    BM: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, RB: tl.constexpr,
    RANK_BLOCKS: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_IDS: tl.constexpr, INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_p = tl.cdiv(M, BM), tl.cdiv(N // 2, BP)
    tile = tl.program_id(0)
    first_m = (tile // (GROUP_M * tiles_p)) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    place = tile % (GROUP_M * tiles_p)
    m = (first_m + place % height) * BM + tl.arange(0, BM)
    p = (place // height) * BP + tl.arange(0, BP)
    here, inside = m < M, p < N // 2
    head, i = p // (D // 2), p % (D // 2)
    if INTERLEAVED:
        one, two = 2 * i, 2 * i + 1
    else:
        one = tl.where(i < R // 2, i, i + R // 2)
        two = tl.where(i < R // 2, i + R // 2, i + D // 2)
    column1, column2 = head * D + one, head * D + two
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.where(here, m, 0).to(tl.int64)
    acc1 = tl.zeros((BM, BP), tl.float32)
    acc2 = tl.zeros((BM, BP), tl.float32)
    for block in tl.range(0, RANK_BLOCKS):
        r = block * RB + tl.arange(0, RB)
        u = tl.load(s + row[:, None] * sm + r[None, :] * sr, mask=(r < rank)[None, :], other=0.0)
        v1 = _rows_of(b, column1, r, inside, rank, bn, br, False).to(tl.float32).to(dtype)
        v2 = _rows_of(b, column2, r, inside, rank, bn, br, False).to(tl.float32).to(dtype)
        acc1 = tl.dot(u, v1, acc1, input_precision=PRECISION)
        acc2 = tl.dot(u, v2, acc2, input_precision=PRECISION)
    acc1 *= scale
    acc2 *= scale
    for first in tl.range(0, K, BK):
        k = first + tl.arange(0, BK)
        left = x + row[:, None] * xm + k.to(tl.int64)[None, :] * xk
        if EVEN_K:
            a = tl.load(left)
        else:
            a = tl.load(left, mask=(k < K)[None, :], other=0.0)
        acc1 = tl.dot(
            a, _rows_of(w, column1, k, inside, K, wn, wk, EVEN_K), acc1, input_precision=PRECISION
        )
        acc2 = tl.dot(
            a, _rows_of(w, column2, k, inside, K, wn, wk, EVEN_K), acc2, input_precision=PRECISION
        )
    if HAS_BIAS:
        at = bias + column1.to(tl.int64) * bias_stride
        acc1 += tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
        at = bias + column2.to(tl.int64) * bias_stride
        acc2 += tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
    sequence, n = row // S, row % S
    if HAS_IDS:
        n = tl.load(ids + sequence * ib + n * in_).to(tl.int64)
        known = (n >= 0) & (n < positions)
        n = tl.where(known, n, 0)
        sequence = tl.zeros_like(sequence)
    else:
        known = n >= 0
    mask = here[:, None] & (inside & (i < R // 2) & (head < turned))[None, :]
    at_cos, at_sin = sequence * cb + n * cn, sequence * zb + n * zn
    z1 = acc1 * _table(cos, at_cos, one, known, cr, mask, 1.0)
    z1 -= acc2 * _table(sin, at_sin, one, known, zr, mask, 0.0)
    z2 = acc2 * _table(cos, at_cos, two, known, cr, mask, 1.0)
    z2 += acc1 * _table(sin, at_sin, two, known, zr, mask, 0.0)
    out = y + m.to(tl.int64)[:, None] * N
    stored = here[:, None] & inside[None, :]
    kind = y.dtype.element_ty
    tl.store(out + column1[None, :], z1.to(kind), mask=stored)
    tl.store(out + column2[None, :], z2.to(kind), mask=stored)
