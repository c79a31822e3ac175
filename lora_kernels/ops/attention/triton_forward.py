# mypy: ignore-errors
"""Forward of attention: online softmax over tiles of keys.

Math       m' = max(m, max_j z_ij), l' = l 2^(m - m') + sum_j 2^(z_ij - m'), the same for O, with z
           in units of log 2 (triton_scores.py); O / l and (m + log2 l) ln 2 at the end. A sink is
           where m and l begin: its logit and 1.
Shapes     q [B, S, H, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv] in any strides, packed with strides
           of 0 for the batch; out contiguous, lse [B, H, S] or packed [H, T].
Grid       row tiles of all B H heads; packed: (row tiles of all sequences, at most B + T / BM, H).
           A program owns BM rows of a head and walks over the keys they see. SPLIT: first the tiles
           that the left edge of the window cuts, then whole ones without any check, then those that
           the right edge or the end of the keys cuts; else one loop that checks them all, which
           takes fewer registers. Causal rows with the most keys start first.
Bytes      q and O once; k and v once per row tile, from L2. Flops 2 (D + Dv) per pair in a tile.
Numerics   scores, softmax, sums and O in fp32; weights are rounded to the dtype of v before the
           second product. No atomics: bitwise reproducible.
Source     Milakov and Gimelshein 2018, arXiv 1805.02867; Dao 2023, arXiv 2307.08691.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.ops.attention.triton_scores import LN_2, LOG2_E, kept, scores
from lora_kernels.ops.attention.triton_tiles import (
    add_dot,
    dot_rows,
    find_tile,
    key_range,
    load_parts,
    scale_parts,
    store_parts,
    zero_parts,
)


@triton.jit
def _walk(
    acc, top, total, q, k, v, mask, seed, start, stop, rows, S, Sk, left, right, scale, softcap,
    slope, s_k, s_v, s_mask, stream, threshold,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr,
    V2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr,
    DROPOUT: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(acc, top, total) after the keys [start, stop)."""
    EXACT: tl.constexpr = k.dtype.element_ty == tl.float32
    for j in tl.range(start, stop, BN):
        keys = j + tl.arange(0, BN)
        k_tile = load_parts(k, j, Sk, s_k[0], s_k[1], BN, D, D1, D2, EDGE)
        z, _ = scores(
            dot_rows(q, k_tile, D2, PRECISION), rows[:, None], keys[None, :], S, Sk, left, right,
            scale, softcap, slope, mask, s_mask[0], s_mask[1],
            SOFTCAP, ALIBI, MASK, HAS_LEFT, HAS_RIGHT, EDGE, EXACT,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(z, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        fade = tl.exp2(top - base)
        p = tl.exp2(z - base[:, None])
        total = total * fade + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(kept(seed, rows, j, stream, threshold, BM, BN, False), p, 0.0)
        v_tile = load_parts(v, j, Sk, s_v[0], s_v[1], BN, DV, V1, V2, EDGE)
        acc = scale_parts(acc, fade[:, None], V2)
        acc = add_dot(acc, p.to(v.dtype.element_ty), v_tile, V2, PRECISION)
        top = new
    return acc, top, total


@triton.jit(do_not_specialize=["B", "S", "Sk", "left", "right", "threshold", "lse_b", "lse_h"])
def forward(
    q, k, v, out, lse, sinks, mask, slopes, seed_ptr, cu_q, cu_k, tile_ends, s_q, s_k, s_v, s_out,
    s_mask, s_slope, lse_b, lse_h, B, S, Sk, H, GROUP, left, right, scale, softcap, threshold,
    keep_scale,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr,
    V2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    VARLEN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
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
    out += (batch * s_out[0] + q_row * s_out[1] + h64 * s_out[2]) * UNIT
    lse += batch * lse_b + h64 * lse_h + q_row
    q_tile = load_parts(q, i0, S, s_q[1] * UNIT, s_q[3], BM, D, D1, D2, True)
    slope, seed = 0.0, 0
    if ALIBI:
        slope = tl.load(slopes + b * s_slope[0] + h * s_slope[1]).to(tl.float32)
    if MASK != 0:
        mask += batch * s_mask[0] + h64 * s_mask[1]
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = zero_parts(BM, V1, V2)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if SINKS:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2_E
        top = tl.zeros((BM,), tl.float32) + sink
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
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
            acc, top, total = _walk(
                acc, top, total, q_tile, k, v, mask, seed, start, stop, rows, S, Sk, left, right,
                scale, softcap, slope, (s_k[1] * UNIT, s_k[3]), (s_v[1] * UNIT, s_v[3]),
                (s_mask[2], s_mask[3]), stream, threshold,
                D, DV, D1, D2, V1, V2, BM, BN, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, MASK, DROPOUT,
                not SPLIT or step != 1, PRECISION,
            )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # top is -inf there
    share = 1.0 / total
    if DROPOUT:
        share *= keep_scale
    acc = scale_parts(acc, share[:, None], V2)
    store_parts(out, i0, S, s_out[1] * UNIT, acc, BM, DV, V1, V2)
    tl.store(lse + rows, (top + tl.log2(total)) * LN_2, mask=rows < S)
