# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton concatenates tuples, it does not unpack them.
"""Few rows against a packed weight: decoded tiles, split sums, the adapter in the same launches.

Math       forward   S  = ks drop(X) A^T,   Y  = X W^T + s S B^T + bias
           dgrad     dS = s ks dY B,        dX = dY W + keep * (dS A)
           Both are  U = us mask(Z) L^T,  C = Z R^T + out_mask * (scale U V) + bias, with Z the rows
           [M, Q], R = W [P, Q] or W^T, L [r, Q] = A or B^T, and V [r, P] = B^T or A.
Grid       products: (P tiles + r tiles, M tiles, SPLIT). A program holds BH rows of R, or of L,
           against BM rows of Z and walks over its range of Q in steps of BQ; what it decodes is the
           left operand, from registers where the matrix unit takes it there (C is computed
           transposed), so BM may be as small as 16. Partial sums leave in fp32, those of U as r
           more columns of C; without adapter and split, C itself leaves.
           finish: (P tiles, M tiles) adds the partial sums of a tile and its U, multiplies by V.
Bytes      the packed weight once per M tile (from L2 after the first), Z and C once, and
           4 SPLIT M (P + r) for the partial sums, written and read once. Bound by the weight up
           to some 64 rows.
Numerics   W is rounded to the dtype of Z as the contract says; fp32 sums in the order of Q within a
           split, the splits in order; U rounded once as a multiplicand, C once.
Batch      an element of C depends on its own row of Z and on nothing else: BH, BQ, SPLIT, the order
           of all sums and the shape of the matrix instruction along the sum are functions of P, Q,
           the format and the device, not of M. M chooses BM alone, the width of the instruction,
           each column of which is its own sum.
Limits     any extents; rank in blocks of RB.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.ops._triton_philox import keep_tile
from lora_kernels.ops.quant_linear.triton_decode import code_of, fetch, values


@triton.jit
def _z_tile(z, q, m, Q, M, szq, szm):
    """Z^T [len(q), len(m)]; zero outside."""
    pointers = z + q.to(tl.int64)[:, None] * szq + m.to(tl.int64)[None, :] * szm
    return tl.load(pointers, mask=(q < Q)[:, None] & (m < M)[None, :], other=0.0)


@triton.jit
def _fetch_step(
    z, parts, h0, m, step, steps, M, N, K, szm, szq,
    BH: tl.constexpr, BQ: tl.constexpr, BACKWARD: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ACT_ORDER: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Operands of a step as they lie in memory. Past the end: the last weights again, rows of 0."""
    q = step * BQ + tl.arange(0, BQ)
    q0 = tl.minimum(step, steps - 1) * BQ
    if BACKWARD:
        tile = fetch(parts, q0, h0, N, K, LAYOUT, BLOCK, NESTED, ACT_ORDER, FAST, BQ, BH)
        return tile, _z_tile(z, q, m, N, M, szq, szm)
    else:
        tile = fetch(parts, h0, q0, N, K, LAYOUT, BLOCK, NESTED, ACT_ORDER, FAST, BH, BQ)
        return tile, _z_tile(z, q, m, K, M, szq, szm)


@triton.jit
def _weight_sum(
    z, parts, h0, m, M, N, K, szm, szq, first, last, steps,
    BH: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr, AHEAD: tl.constexpr,
    BACKWARD: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    ACT_ORDER: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """AHEAD steps are in flight, in registers: a lookup between a load and a product keeps Triton
    from making a pipeline of shared memory that is worth its instructions."""
    acc = tl.zeros((BH, BM), tl.float32)
    dtype: tl.constexpr = z.dtype.element_ty
    code = code_of(parts, LAYOUT)
    queue = ()
    for i in tl.static_range(AHEAD):
        queue = queue + (
            _fetch_step(
                z, parts, h0, m, first + i, steps, M, N, K, szm, szq,
                BH, BQ, BACKWARD, LAYOUT, BLOCK, NESTED, ACT_ORDER, FAST,
            ),
        )  # fmt: skip
    for start in tl.range(first, last, AHEAD, num_stages=1):
        following = ()
        for i in tl.static_range(AHEAD):
            tile, rows = queue[i]
            following = following + (
                _fetch_step(
                    z, parts, h0, m, start + AHEAD + i, steps, M, N, K, szm, szq,
                    BH, BQ, BACKWARD, LAYOUT, BLOCK, NESTED, ACT_ORDER, FAST,
                ),
            )  # fmt: skip
            if BACKWARD:
                w = tl.trans(values(tile, code, LAYOUT, FAST, BQ, BH))
            else:
                w = values(tile, code, LAYOUT, FAST, BH, BQ)
            acc = tl.dot(w.to(dtype), rows, acc, input_precision=PRECISION)
        queue = following
    return acc


@triton.jit
def _adapter_sum(
    z, left, seed_ptr, r, m, M, Q, rank, szm, szq, slr, slq, threshold, first, last,
    BH: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BH, BM), tl.float32)
    dtype: tl.constexpr = z.dtype.element_ty
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for step in tl.range(first, last):
        q = step * BQ + tl.arange(0, BQ)
        pointers = left + r.to(tl.int64)[:, None] * slr + q.to(tl.int64)[None, :] * slq
        tile = tl.load(pointers, mask=(r < rank)[:, None] & (q < Q)[None, :], other=0.0)
        rows = _z_tile(z, q, m, Q, M, szq, szm)
        if DROPOUT:
            keep = keep_tile(seed, m, step * BQ, 0, threshold, BM, BQ)
            rows = tl.where(tl.trans(keep), rows, 0.0)
        acc = tl.dot(tile.to(tl.float32).to(dtype), rows, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "threshold", "steps_per_split"])
def products(
    z, parts, left, bias, out, seed_ptr, M, N, K, rank, szm, szq, slr, slq, bias_stride,
    threshold, steps_per_split,
    BH: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr, AHEAD: tl.constexpr,
    BACKWARD: tl.constexpr, PARTIAL: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, ACT_ORDER: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    P, Q = (K, N) if BACKWARD else (N, K)
    tile, split = tl.program_id(0), tl.program_id(2)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    weight_tiles = tl.cdiv(P, BH)
    first = split * steps_per_split
    steps = tl.cdiv(Q, BQ)
    last = tl.minimum(first + steps_per_split, steps)
    if tile < weight_tiles:
        acc = _weight_sum(
            z, parts, tile * BH, m, M, N, K, szm, szq, first, last, steps,
            BH, BM, BQ, AHEAD, BACKWARD, LAYOUT, BLOCK, NESTED, ACT_ORDER, FAST, PRECISION,
        )  # fmt: skip
        h = tile * BH + tl.arange(0, BH)
        column, end = h, P
    else:
        r = (tile - weight_tiles) * BH + tl.arange(0, BH)
        acc = _adapter_sum(
            z, left, seed_ptr, r, m, M, Q, rank, szm, szq, slr, slq, threshold, first, last,
            BH, BM, BQ, DROPOUT and not BACKWARD, PRECISION,
        )  # fmt: skip
        column, end = P + r, P + rank
    width = P + rank
    inside = (column < end)[:, None] & (m < M)[None, :]
    if PARTIAL:
        out += split.to(tl.int64) * M * width
    if HAS_BIAS and not PARTIAL:
        acc += tl.load(bias + column.to(tl.int64) * bias_stride, mask=column < end, other=0.0).to(
            tl.float32
        )[:, None]
    pointers = out + m.to(tl.int64)[None, :] * width + column[:, None]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_of_splits(partial, m, column, inside, width, stride, splits, R: tl.constexpr,
                   C: tl.constexpr):  # fmt: skip
    total = tl.zeros((R, C), tl.float32)
    source = partial + m.to(tl.int64)[:, None] * width + column[None, :]
    for _ in tl.range(0, splits):
        total += tl.load(source, mask=inside, other=0.0)
        source += stride
    return total


@triton.jit(do_not_specialize=["M", "threshold", "scale", "u_scale"])
def finish(
    partial, u, v, bias, out, seed_ptr, M, P, rank, svr, svp, bias_stride, splits, u_scale, scale,
    threshold,
    BM: tl.constexpr, BP: tl.constexpr, RB: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """C from the partial sums of `products`, and U [M, rank] where there is an adapter."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    width = P + rank
    stride = M.to(tl.int64) * width
    dtype: tl.constexpr = out.dtype.element_ty
    update = tl.zeros((BM, BP), tl.float32)
    for first in tl.range(0, rank, RB):
        r = first + tl.arange(0, RB)
        inside = (m < M)[:, None] & (r < rank)[None, :]
        tile = _sum_of_splits(partial, m, P + r, inside, width, stride, splits, BM, RB)
        tile = (tile * u_scale).to(dtype)
        if tl.program_id(0) == 0:
            tl.store(u + m.to(tl.int64)[:, None] * rank + r[None, :], tile, mask=inside)
        pointers = v + r.to(tl.int64)[:, None] * svr + p.to(tl.int64)[None, :] * svp
        right = tl.load(pointers, mask=(r < rank)[:, None] & (p < P)[None, :], other=0.0)
        update = tl.dot(tile, right.to(tl.float32).to(dtype), update, input_precision=PRECISION)
    if DROPOUT:
        keep = keep_tile(tl.load(seed_ptr), m, tl.program_id(0) * BP, 0, threshold, BM, BP)
        update = tl.where(keep, update, 0.0)
    inside = (m < M)[:, None] & (p < P)[None, :]
    total = _sum_of_splits(partial, m, p, inside, width, stride, splits, BM, BP) + update * scale
    if HAS_BIAS:
        total += tl.load(bias + p.to(tl.int64) * bias_stride, mask=p < P, other=0.0).to(tl.float32)[
            None, :
        ]
    tl.store(out + m.to(tl.int64)[:, None] * P + p[None, :], total.to(dtype), mask=inside)
