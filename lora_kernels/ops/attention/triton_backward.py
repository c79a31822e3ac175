# mypy: ignore-errors
"""Backward of attention: the scores are made again, twice, and nothing is added atomically.

Math       delta_i = dO_i O_i - dlse_i              dt = -sum_i e^(t - lse_i) delta_i
           p_ij = 2^(z_ij - lse_i / ln 2)           dz_ij = p_ij (w_ij dO_i v_j - delta_i)
           dq_i = s sum_j dz'_ij k_j                dz' = dz (1 - tanh^2) below a softcap
           dk_j = s sum_i dz'_ij q_i                dv_j = sum_i p_ij w_ij dO_i
Shapes     as in triton_forward.py; O and dO in any strides, lse and dlse contiguous, delta as lse,
           gradients contiguous.
Grid       row_terms: as the forward; one partial sum of dt for each program, added by a library
           sum over them. grad_q: as the forward. grad_kv: key tiles of all kv heads; a program
           owns BN keys, walks over the query heads of its group and the rows that see its keys, and
           holds their dk and dv: heads of a group are summed in one order, in registers.
Bytes      grad_q reads k and v once per row tile, grad_kv q and dO once per key tile and query
           head, from L2. Flops per pair in a tile: 2 (2 D + Dv) and 2 (2 D + 2 Dv).
Numerics   weights and dz are rounded to the dtype of the operands before their products, sums are
           fp32 and rounded once. Bitwise reproducible.
Source     Dao 2023, arXiv 2307.08691, algorithm 2, with dq in a pass of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.ops.attention.triton_scores import LOG2_E, kept, log_sum_of_rows, scores
from lora_kernels.ops.attention.triton_tiles import (
    add_dot,
    dot_rows,
    find_tile,
    key_range,
    load_parts,
    row_range,
    scale_parts,
    store_parts,
    zero_parts,
)


@triton.jit(do_not_specialize=["B", "S", "lse_b", "lse_h"])
def row_terms(
    out, dout, lse, dlse, delta, sinks, dsinks_part, cu_q, tile_ends, s_out, s_dout, lse_b, lse_h,
    B, S, H, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, BM: tl.constexpr,
    UNIT: tl.constexpr, VARLEN: tl.constexpr, SINKS: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    if VARLEN:
        h = tl.program_id(1)
        slot = h * tl.num_programs(0) + tl.program_id(0)
        if tl.program_id(0) >= tl.load(tile_ends + B - 1):
            if SINKS:
                tl.store(dsinks_part + slot, 0.0)
            return
        b, tile = find_tile(tile_ends, tl.program_id(0), B)
        q_row = tl.load(cu_q + b).to(tl.int64)
        S = (tl.load(cu_q + b + 1) - q_row).to(tl.int32)
        batch = b.to(tl.int64) * 0
    else:
        tiles = tl.cdiv(S, BM)
        tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
        b, h = head // H, head % H
        slot = (h * B + b) * tiles + tile
        batch = b.to(tl.int64)
        q_row = batch * 0
    h64 = h.to(tl.int64)
    i0 = tile * BM
    rows = i0 + tl.arange(0, BM)
    out += (batch * s_out[0] + q_row * s_out[1] + h64 * s_out[2]) * UNIT
    dout += (batch * s_dout[0] + q_row * s_dout[1] + h64 * s_dout[2]) * UNIT
    at = batch * lse_b + h64 * lse_h + q_row
    o = load_parts(out, i0, S, s_out[1] * UNIT, s_out[3], BM, DV, V1, V2, True)
    do = load_parts(dout, i0, S, s_dout[1] * UNIT, s_dout[3], BM, DV, V1, V2, True)
    value = tl.sum(o[0].to(tl.float32) * do[0].to(tl.float32), 1)
    if V2 != 0:
        value += tl.sum(o[1].to(tl.float32) * do[1].to(tl.float32), 1)
    if DLSE:
        value -= tl.load(dlse + at + rows, mask=rows < S, other=0.0)
    tl.store(delta + at + rows, value, mask=rows < S)
    if SINKS:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2_E
        p = tl.exp2(sink - log_sum_of_rows(lse + at, rows, S))
        tl.store(dsinks_part + slot, -tl.sum(tl.where(rows < S, p * value, 0.0), 0))


@triton.jit
def weight_gradient(z, t, dp, lse, delta, keep, keep_scale, SOFTCAP: tl.constexpr,
                    DROPOUT: tl.constexpr):  # fmt: skip
    """(weights with what is dropped 0, not scaled; dz'; dz) of a tile; lse and delta broadcast."""
    p = tl.exp2(z - lse)
    kept_p = p
    if DROPOUT:
        kept_p = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    dz = p * (dp - delta)
    inner = dz
    if SOFTCAP:
        inner = dz * (1.0 - t * t)
    return kept_p, inner, dz


@triton.jit
def _walk_keys(
    acc, q, do, lse, delta, k, v, mask, seed, start, stop, rows, S, Sk, left, right, scale,
    softcap, slope, s_k, s_v, s_mask, stream, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr,
    V2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr,
    DROPOUT: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq / s after the keys [start, stop)."""
    EXACT: tl.constexpr = k.dtype.element_ty == tl.float32
    for j in tl.range(start, stop, BN):
        keys = j + tl.arange(0, BN)
        k_tile = load_parts(k, j, Sk, s_k[0], s_k[1], BN, D, D1, D2, EDGE)
        z, t = scores(
            dot_rows(q, k_tile, D2, PRECISION), rows[:, None], keys[None, :], S, Sk, left, right,
            scale, softcap, slope, mask, s_mask[0], s_mask[1],
            SOFTCAP, ALIBI, MASK, HAS_LEFT, HAS_RIGHT, EDGE, EXACT,
        )  # fmt: skip
        v_tile = load_parts(v, j, Sk, s_v[0], s_v[1], BN, DV, V1, V2, EDGE)
        dp = dot_rows(do, v_tile, V2, PRECISION)
        keep = 0
        if DROPOUT:
            keep = kept(seed, rows, j, stream, threshold, BM, BN, False)
        _, dz, _ = weight_gradient(
            z, t, dp, lse[:, None], delta[:, None], keep, keep_scale, SOFTCAP, DROPOUT
        )  # fmt: skip
        acc = add_dot(acc, dz.to(k.dtype.element_ty), k_tile, D2, PRECISION)
    return acc


@triton.jit(do_not_specialize=["B", "S", "Sk", "left", "right", "threshold", "lse_b", "lse_h"])
def grad_q(
    q, k, v, dout, lse, delta, dq, mask, slopes, seed_ptr, cu_q, cu_k, tile_ends, s_q, s_k, s_v,
    s_dout, s_dq, s_mask, s_slope, lse_b, lse_h, B, S, Sk, H, GROUP, left, right, scale, softcap,
    threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr,
    V2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    if VARLEN:
        if tl.program_id(0) >= tl.load(tile_ends + B - 1):
            return
        b, tile = find_tile(tile_ends, tl.program_id(0), B)
        h = tl.program_id(1)
        q_row, k_row = tl.load(cu_q + b).to(tl.int64), tl.load(cu_k + b).to(tl.int64)
        S = (tl.load(cu_q + b + 1) - q_row).to(tl.int32)
        Sk = (tl.load(cu_k + b + 1) - k_row).to(tl.int32)
        batch = b.to(tl.int64) * 0
    else:
        tiles = tl.cdiv(S, BM)
        tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
        b, h = head // H, head % H
        if HAS_RIGHT:
            tile = tiles - 1 - tile
        batch = b.to(tl.int64)
        q_row, k_row = batch * 0, batch * 0
    stream = b * H + h
    h64, hk = h.to(tl.int64), (h // GROUP).to(tl.int64)
    i0 = tile * BM
    rows = i0 + tl.arange(0, BM)
    q += (batch * s_q[0] + q_row * s_q[1] + h64 * s_q[2]) * UNIT
    k += (batch * s_k[0] + k_row * s_k[1] + hk * s_k[2]) * UNIT
    v += (batch * s_v[0] + k_row * s_v[1] + hk * s_v[2]) * UNIT
    dout += (batch * s_dout[0] + q_row * s_dout[1] + h64 * s_dout[2]) * UNIT
    dq += (batch * s_dq[0] + q_row * s_dq[1] + h64 * s_dq[2]) * UNIT
    at = batch * lse_b + h64 * lse_h + q_row
    q_tile = load_parts(q, i0, S, s_q[1] * UNIT, s_q[3], BM, D, D1, D2, True)
    do_tile = load_parts(dout, i0, S, s_dout[1] * UNIT, s_dout[3], BM, DV, V1, V2, True)
    lse_rows = log_sum_of_rows(lse + at, rows, S)
    delta_rows = tl.load(delta + at + rows, mask=rows < S, other=0.0)
    slope, seed = 0.0, 0
    if ALIBI:
        slope = tl.load(slopes + b * s_slope[0] + h * s_slope[1]).to(tl.float32)
    if MASK != 0:
        mask += batch * s_mask[0] + h64 * s_mask[1]
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = zero_parts(BM, D1, D2)
    low, full_low, full_high, high = key_range(
        i0, S, Sk, left, right, HAS_LEFT, HAS_RIGHT, BM, BN
    )  # fmt: skip
    for step in tl.static_range(3):
        if step == 0:
            start, stop = low, tl.minimum(full_low, high)
        elif step == 1:
            start, stop = full_low, full_high
        else:
            start, stop = tl.maximum(full_low, full_high), high
        if not SPLIT:
            start, stop = low, high
        if (SPLIT and (step != 0 or HAS_LEFT)) or (not SPLIT and step == 2):
            acc = _walk_keys(
                acc, q_tile, do_tile, lse_rows, delta_rows, k, v, mask, seed, start, stop, rows,
                S, Sk, left, right, scale, softcap, slope, (s_k[1] * UNIT, s_k[3]),
                (s_v[1] * UNIT, s_v[3]), (s_mask[2], s_mask[3]), stream, threshold, keep_scale,
                D, DV, D1, D2, V1, V2, BM, BN, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, MASK, DROPOUT,
                not SPLIT or step != 1, PRECISION,
            )  # fmt: skip
    store_parts(dq, i0, S, s_dq[1] * UNIT, scale_parts(acc, scale, D2), BM, D, D1, D2)


@triton.jit(do_not_specialize=["B", "S", "Sk", "left", "right", "threshold", "lse_b", "lse_h"])
def grad_kv(
    q, k, v, dout, lse, delta, dk, dv, mask, slopes, seed_ptr, cu_q, cu_k, tile_ends, s_q, s_k,
    s_v, s_dout, s_dk, s_dv, s_mask, s_slope, lse_b, lse_h, B, S, Sk, HK, GROUP, left, right,
    scale, softcap, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr,
    V2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if VARLEN:
        if tl.program_id(0) >= tl.load(tile_ends + B - 1):
            return
        b, tile = find_tile(tile_ends, tl.program_id(0), B)
        hk = tl.program_id(1)
        q_row, k_row = tl.load(cu_q + b).to(tl.int64), tl.load(cu_k + b).to(tl.int64)
        S = (tl.load(cu_q + b + 1) - q_row).to(tl.int32)
        Sk = (tl.load(cu_k + b + 1) - k_row).to(tl.int32)
        batch = b.to(tl.int64) * 0
    else:
        tiles = tl.cdiv(Sk, BN)
        tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
        b, hk = head // HK, head % HK
        batch = b.to(tl.int64)
        q_row, k_row = batch * 0, batch * 0
    hk64 = hk.to(tl.int64)
    j0 = tile * BN
    q += (batch * s_q[0] + q_row * s_q[1]) * UNIT
    dout += (batch * s_dout[0] + q_row * s_dout[1]) * UNIT
    k += (batch * s_k[0] + k_row * s_k[1] + hk64 * s_k[2]) * UNIT
    v += (batch * s_v[0] + k_row * s_v[1] + hk64 * s_v[2]) * UNIT
    dk += (batch * s_dk[0] + k_row * s_dk[1] + hk64 * s_dk[2]) * UNIT
    dv += (batch * s_dv[0] + k_row * s_dv[1] + hk64 * s_dv[2]) * UNIT
    at = batch * lse_b + q_row
    k_tile = load_parts(k, j0, Sk, s_k[1] * UNIT, s_k[3], BN, D, D1, D2, True)
    v_tile = load_parts(v, j0, Sk, s_v[1] * UNIT, s_v[3], BN, DV, V1, V2, True)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    dk_acc, dv_acc = zero_parts(BN, D1, D2), zero_parts(BN, V1, V2)
    # Heads and row tiles in one loop: its loads run on from head to head, and a nest of loops would
    # keep twice the addresses.
    low, high = row_range(j0, S, Sk, left, right, HAS_LEFT, HAS_RIGHT, BM, BN)
    row_tiles = tl.cdiv(tl.maximum(high - low, 0), BM)
    dtype: tl.constexpr = q.dtype.element_ty
    keys = j0 + tl.arange(0, BN)
    for n in tl.range(0, GROUP * row_tiles):
        h = hk * GROUP + n // row_tiles
        h64 = h.to(tl.int64)
        i = low + n % row_tiles * BM
        rows = i + tl.arange(0, BM)
        q_tile = load_parts(
            q + h64 * s_q[2] * UNIT, i, S, s_q[1] * UNIT, s_q[3], BM, D, D1, D2, True
        )  # fmt: skip
        slope, matrix = 0.0, mask
        if ALIBI:
            slope = tl.load(slopes + b * s_slope[0] + h * s_slope[1]).to(tl.float32)
        if MASK != 0:
            matrix = mask + batch * s_mask[0] + h64 * s_mask[1]
        z, t = scores(
            dot_rows(k_tile, q_tile, D2, PRECISION), rows[None, :], keys[:, None], S, Sk, left,
            right, scale, softcap, slope, matrix, s_mask[2], s_mask[3],
            SOFTCAP, ALIBI, MASK, HAS_LEFT, HAS_RIGHT, HAS_LEFT or HAS_RIGHT, dtype == tl.float32,
        )  # fmt: skip
        do_tile = load_parts(
            dout + h64 * s_dout[2] * UNIT, i, S, s_dout[1] * UNIT, s_dout[3], BM, DV, V1, V2, True
        )  # fmt: skip
        lse_rows = log_sum_of_rows(lse + at + h64 * lse_h, rows, S)
        delta_rows = tl.load(delta + at + h64 * lse_h + rows, mask=rows < S, other=0.0)
        dp = dot_rows(v_tile, do_tile, V2, PRECISION)
        keep = 0
        if DROPOUT:
            stream = b * GROUP * HK + h
            keep = kept(seed, rows, j0, stream, threshold, BM, BN, True)
        p, dz, _ = weight_gradient(
            z, t, dp, lse_rows[None, :], delta_rows[None, :], keep, keep_scale, SOFTCAP, DROPOUT
        )  # fmt: skip
        dv_acc = add_dot(dv_acc, p.to(dtype), do_tile, V2, PRECISION)
        dk_acc = add_dot(dk_acc, dz.to(dtype), q_tile, D2, PRECISION)
    if DROPOUT:
        dv_acc = scale_parts(dv_acc, keep_scale, V2)
    store_parts(dk, j0, Sk, s_dk[1] * UNIT, scale_parts(dk_acc, scale, D2), BN, D, D1, D2)
    store_parts(dv, j0, Sk, s_dv[1] * UNIT, dv_acc, BN, DV, V1, V2)
