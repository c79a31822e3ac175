# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton concatenates tuples, it does not unpack them.
"""Adapter gradients: one pass over dY for dS and dB, one pass over X for dA, no atomics.

Math       dS[m, r] = s ks sum_n dY[m, n] B[n, r]          dB[n, r] = s sum_m dY[m, n] S[m, r]
           dA_g[r, k] = sum_m dS_g[m, r] keep_g[m, k] X[m, k]
Shapes     dY [M, N], X [M, K], B [N, r] in any strides; S [M, sum r_g] and dS_g [M, r_g] with
           unit column stride; partial sums in fp32: dS [N tiles, M, r], dB [SPLIT, N, r],
           dA [SPLIT, sum r_g, K].
Grid       dy_pass: (ceil(N / BN), SPLIT). A program holds its BN rows of dB in registers, walks
           down its range of M and meets each tile of dY once: a partial sum of dS leaves per tile.
           da_pass: (ceil(K / BK), SPLIT). A program holds dA_g[:, BK columns] of all members and
           walks down its range of M; X is read once for the group.
           sum_partials: one launch adds the partial sums of all results of a direction, each
           element by one thread in a fixed order.
Bytes      dy_pass: dY once (2 M N); partial sums 8 M r ceil(N / BN) + 8 N r SPLIT, most of which
           stays in L2. da_pass: X once (2 M K) + 8 SPLIT K sum(r). Both bound by bytes.
Numerics   fp32 accumulators across all of M, scaled and rounded once, to the dtype of B or A; S
           and dS are multiplicands in the dtype of X. Bitwise reproducible.
Limits     BN * RP and BK * G * RP <= 128 * 256 by registers (configs.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.ops._triton_philox import keep_tile


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def dy_pass(
    dy, b, s, ds_part, db_part, M, N, rank, sdm, sdn, sbn, sbr, s_row, rows_per_split,
    RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NEED_DS: tl.constexpr, NEED_DB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    r = tl.arange(0, RP)
    dtype = dy.dtype.element_ty
    dy_columns = dy + n.to(tl.int64)[None, :] * sdn
    if NEED_DS:
        b_inside = (n < N)[:, None] & (r < rank)[None, :]
        b_tile = tl.load(
            b + n.to(tl.int64)[:, None] * sbn + r[None, :] * sbr, mask=b_inside, other=0.0
        )
        if b_tile.dtype != dtype:
            b_tile = b_tile.to(tl.float32).to(dtype)
        ds_part += tile.to(tl.int64) * M * rank
    db = tl.zeros((BN, RP), tl.float32)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    for row in tl.range(first, last, BM):
        m = row + tl.arange(0, BM)
        inside = (m < last)[:, None]
        m64 = m.to(tl.int64)[:, None]
        grad = tl.load(dy_columns + m64 * sdm, mask=inside & (n < N)[None, :], other=0.0)
        if NEED_DS:
            ds = tl.dot(grad, b_tile, input_precision=PRECISION)
            tl.store(ds_part + m64 * rank + r[None, :], ds, mask=inside & (r < rank)[None, :])
        if NEED_DB:
            s_tile = tl.load(
                s + m64 * s_row + r[None, :], mask=inside & (r < rank)[None, :], other=0.0
            )
            db = tl.dot(tl.trans(grad), s_tile, db, input_precision=PRECISION)
    if NEED_DB:
        out = db_part + (split.to(tl.int64) * N + n[:, None]) * rank + r[None, :]
        tl.store(out, db, mask=(n < N)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["M", "threshold", "rows_per_split"])
def da_pass(
    x, ds_ptrs, da_part, seed_ptr, M, K, total_rank, ranks, ds_rows, sxm, sxk,
    threshold, rows_per_split, stream,
    G: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0), tl.program_id(1)
    da_part += split.to(tl.int64) * total_rank * K
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    k = block * BK + tl.arange(0, BK)
    sums = ()
    for _ in tl.static_range(G):
        sums = sums + (tl.zeros((RP, BK), tl.float32),)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for row in tl.range(first, last, BM):
        m = row + tl.arange(0, BM)
        tile = _x_tile(x, m, k, last, K, sxm, sxk)
        added = ()
        for g in tl.static_range(G):
            ds = _ds_tile(ds_ptrs[g], m, last, ranks[g], ds_rows[g], RP)
            kept = tile
            if DROPOUT:
                keep = keep_tile(seed, m, block * BK, stream + g, threshold, BM, BK)
                kept = tl.where(keep, tile, 0.0)
            added = added + (tl.dot(tl.trans(ds), kept, sums[g], input_precision=PRECISION),)
        sums = added
    first_row = 0
    for g in tl.static_range(G):
        _store(da_part, sums[g], first_row, ranks[g], k, K, RP)
        first_row += ranks[g]


@triton.jit
def _x_tile(x, m, k, last, K, sxm, sxk):
    pointers = x + m.to(tl.int64)[:, None] * sxm + k.to(tl.int64)[None, :] * sxk
    return tl.load(pointers, mask=(m < last)[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def _ds_tile(ds, m, last, rank, row, RP: tl.constexpr):
    r = tl.arange(0, RP)
    pointers = ds + m.to(tl.int64)[:, None] * row + r[None, :]
    return tl.load(pointers, mask=(m < last)[:, None] & (r < rank)[None, :], other=0.0)


@triton.jit
def _store(da, total, first_row, rank, k, K, RP: tl.constexpr):
    r = tl.arange(0, RP)
    pointers = da + (first_row + r).to(tl.int64)[:, None] * K + k[None, :]
    tl.store(pointers, total, mask=(r < rank)[:, None] & (k < K)[None, :])


@triton.jit
def sum_partials(
    parts, outs, counts, lengths, strides, first_blocks, scales,
    G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """outs[g][i] = scales[g] * sum over p < counts[g] of parts[g][p * strides[g] + i]."""
    program = tl.program_id(0)
    for g in tl.static_range(G):
        block = program - first_blocks[g]
        if (block >= 0) & (block * BLOCK < lengths[g]):
            i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = i < lengths[g]
            total = tl.zeros((BLOCK,), tl.float32)
            source = parts[g] + i
            for _ in tl.range(0, counts[g]):
                total += tl.load(source, mask=inside, other=0.0)
                source += strides[g]
            out = outs[g]
            tl.store(out + i, (total * scales[g]).to(out.dtype.element_ty), mask=inside)
