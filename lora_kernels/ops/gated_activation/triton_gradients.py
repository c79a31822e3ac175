# mypy: ignore-errors
"""Gradients of the activation, and dS and dB of gate and up while those are in registers.

Math       dg = dh u act'(g), du = dh act(g), rounded to T;   with d_0 = dg, d_1 = du
           dS_j = scaling_j d_j B_j      dB_j = scaling_j d_j^T S_j
Shapes     dh, g, u [M, N], B_j [N, r_j], S [M, sum r_j] in any strides; dg, du [M, N] contiguous;
           partial sums in fp32: dS [N tiles, M, sum r_j], dB_j [SPLIT, N, r_j] (of one tile or
           split the results themselves)
Grid       (ceil(N / BN), SPLIT): a program holds its BN rows of both dB in registers, walks down
           its range of M and meets every tile of dh, g and u once; a partial sum of dS leaves per
           tile. Without adapters every program has one tile.
Bytes      dh, g, u read, dg, du written (10 M N for bf16); partial sums 8 M sum(r) ceil(N / BN)
           + 8 N sum(r) SPLIT. Two passes over dg and du are saved (8 M N in bf16: dS and dB).
Numerics   fp32 from g to dg; the rounded dg and du are the multiplicands. Scaled in fp32, rounded
           once. Bitwise reproducible.
Limits     BN * RP <= 8192 by registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.ops.gated_activation.triton_activate import activation_and_slope, as_multiplicand


@triton.jit
def _b_tile(b, n, rank, N, sbn, sbr, RP: tl.constexpr, dtype: tl.constexpr):
    r = tl.arange(0, RP)
    inside = (n < N)[:, None] & (r < rank)[None, :]
    tile = tl.load(b + n.to(tl.int64)[:, None] * sbn + r[None, :] * sbr, mask=inside, other=0.0)
    return as_multiplicand(tile, dtype)


@triton.jit
def _member(
    d, b, s, ds, db, n, N, sbn, sbr, m, inside, total, column, rank, ssm, ssr, scaling,
    RP: tl.constexpr, NEED_DS: tl.constexpr, NEED_DB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores this tile's share of dS and returns dB with its own."""
    r = tl.arange(0, RP)
    own = inside & (r < rank)[None, :]
    m64 = m.to(tl.int64)[:, None]
    # Zeros already where masked. Without a select here the compiler computes the activation in the
    # layout of the operand, many times over, and has no registers left.
    d = tl.where(inside & (n < N)[None, :], d, 0.0).to(d.dtype)
    if NEED_DS:
        # Read anew at every step, from L1: held as an operand it would take half of the registers.
        b_tile = _b_tile(b, n, rank, N, sbn, sbr, RP, d.dtype)
        part = tl.dot(d, b_tile, input_precision=PRECISION) * scaling
        tl.store(ds + m64 * total + (column + r)[None, :], part.to(ds.dtype.element_ty), mask=own)
    if NEED_DB:
        s_tile = tl.load(s + m64 * ssm + (column + r)[None, :] * ssr, mask=own, other=0.0)
        db = tl.dot(tl.trans(d), s_tile, db, input_precision=PRECISION)
    return db


@triton.jit(do_not_specialize=["M", "rows_per_split", "gate_scaling", "up_scaling"])
def gradients(
    dh, gate, up, dgate, dup, b_gate, b_up, s, ds, db_gate, db_up, M, N, total, gate_rank, up_rank,
    shm, shn, sgm, sgn, sum_, sun, sbgn, sbgr, sbun, sbur, ssm, ssr,
    gate_scaling, up_scaling, rows_per_split,
    RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr,
    GATED: tl.constexpr, NEED_DS: tl.constexpr, NEED_DB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    column = (n < N)[None, :]
    n64 = n.to(tl.int64)[None, :]
    dtype = gate.dtype.element_ty
    if NEED_DS:
        ds += tile.to(tl.int64) * M * total
    db0 = tl.zeros((BN, RP), tl.float32)
    db1 = tl.zeros((BN, RP), tl.float32)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    for row in tl.range(first, last, BM):
        m = row + tl.arange(0, BM)
        m64 = m.to(tl.int64)[:, None]
        inside = (m < last)[:, None]
        both = inside & column
        g = tl.load(gate + m64 * sgm + n64 * sgn, mask=both, other=0.0).to(tl.float32)
        grad = tl.load(dh + m64 * shm + n64 * shn, mask=both, other=0.0).to(tl.float32)
        act, slope = activation_and_slope(g, KIND)
        if GATED:
            u = tl.load(up + m64 * sum_ + n64 * sun, mask=both, other=0.0).to(tl.float32)
            du = (grad * act).to(dtype)
            tl.store(dup + m64 * N + n64, du, mask=both)
            dg = (grad * u * slope).to(dtype)
        else:
            dg = (grad * slope).to(dtype)
        tl.store(dgate + m64 * N + n64, dg, mask=both)
        if NEED_DS or NEED_DB:
            db0 = _member(
                dg, b_gate, s, ds, db0, n, N, sbgn, sbgr, m, inside, total, 0, gate_rank, ssm, ssr,
                gate_scaling, RP, NEED_DS, NEED_DB, PRECISION,
            )  # fmt: skip
            if GATED:
                db1 = _member(
                    du, b_up, s, ds, db1, n, N, sbun, sbur, m, inside, total, gate_rank, up_rank,
                    ssm, ssr, up_scaling, RP, NEED_DS, NEED_DB, PRECISION,
                )  # fmt: skip
    if NEED_DB:
        _store_db(db_gate, db0 * gate_scaling, split, n, N, gate_rank, RP)
        if GATED:
            _store_db(db_up, db1 * up_scaling, split, n, N, up_rank, RP)


@triton.jit
def _store_db(out, value, split, n, N, rank, RP: tl.constexpr):
    r = tl.arange(0, RP)
    at = out + (split.to(tl.int64) * N + n.to(tl.int64)[:, None]) * rank + r[None, :]
    mask = (n < N)[:, None] & (r < rank)[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=mask)
