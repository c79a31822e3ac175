# mypy: ignore-errors
"""Gradient of an additive mask: dz, summed over the axes along which the mask is broadcast.

Math       db = sum over broadcast batch, heads, rows and keys of dz_ij, see triton_backward.py
Shapes     mask [1 or B, 1 or H, 1 or S, 1 or Sk]; db likewise, contiguous, fp32.
Grid       one axis: batches x heads of the mask, its row tiles, its key tiles. A program owns a
           tile of db and walks over everything that is broadcast, in one order, with the tile in
           registers; no tensor of queries x keys exists unless the mask is one.
Numerics   fp32. Bitwise reproducible.
Limits     a mask of few elements has few programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.ops.attention.triton_backward import weight_gradient
from lora_kernels.ops.attention.triton_scores import kept, log_sum_of_rows, scores
from lora_kernels.ops.attention.triton_tiles import dot_rows, key_range, load_parts


@triton.jit(do_not_specialize=["S", "Sk", "left", "right", "threshold", "lse_b", "lse_h"])
def grad_mask(
    q, k, v, dout, lse, delta, dmask, mask, slopes, seed_ptr, s_q, s_k, s_v, s_dout, s_dmask,
    s_mask, s_slope, lse_b, lse_h, S, Sk, H, GROUP, MASK_H, batches, heads, left, right,
    scale, softcap, threshold, keep_scale, row_tiles, key_tiles,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr,
    V2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    ALL_ROWS: tl.constexpr, ALL_KEYS: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`batches`, `heads`: how many of them share this tile. ALL_ROWS, ALL_KEYS: all rows, keys."""
    column, program = tl.program_id(0) % key_tiles, tl.program_id(0) // key_tiles
    row, matrix = program % row_tiles, program // row_tiles
    first_b, first_h = matrix // MASK_H, matrix % MASK_H
    i_start, i_stop = row * BM, row * BM + 1
    j_start, j_stop = column * BN, column * BN + 1
    if ALL_ROWS:
        i_stop = S
    if ALL_KEYS:
        j_stop = Sk
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BM, BN), tl.float32)
    for n in tl.range(0, batches * heads):
        b, h = first_b + n // heads, first_h + n % heads
        b64, h64, hk = b.to(tl.int64), h.to(tl.int64), (h // GROUP).to(tl.int64)
        at = b64 * lse_b + h64 * lse_h
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + b * s_slope[0] + h * s_slope[1]).to(tl.float32)
        for i in tl.range(i_start, i_stop, BM):
            rows = i + tl.arange(0, BM)
            q_tile = load_parts(
                q + (b64 * s_q[0] + h64 * s_q[2]) * UNIT, i, S, s_q[1] * UNIT, s_q[3],
                BM, D, D1, D2, True,
            )  # fmt: skip
            do_tile = load_parts(
                dout + (b64 * s_dout[0] + h64 * s_dout[2]) * UNIT, i, S, s_dout[1] * UNIT,
                s_dout[3], BM, DV, V1, V2, True,
            )  # fmt: skip
            lse_rows = log_sum_of_rows(lse + at, rows, S)
            delta_rows = tl.load(delta + at + rows, mask=rows < S, other=0.0)
            low, _whole, _end, high = key_range(i, S, Sk, left, right, HAS_LEFT, HAS_RIGHT, BM, BN)
            for j in tl.range(tl.maximum(j_start, low), tl.minimum(j_stop, high), BN):
                keys = j + tl.arange(0, BN)
                k_tile = load_parts(
                    k + (b64 * s_k[0] + hk * s_k[2]) * UNIT, j, Sk, s_k[1] * UNIT, s_k[3],
                    BN, D, D1, D2, True,
                )  # fmt: skip
                z, t = scores(
                    dot_rows(q_tile, k_tile, D2, PRECISION), rows[:, None], keys[None, :], S, Sk,
                    left, right, scale, softcap, slope, mask + b64 * s_mask[0] + h64 * s_mask[1],
                    s_mask[2], s_mask[3], SOFTCAP, ALIBI, 2, HAS_LEFT, HAS_RIGHT, True,
                    k.dtype.element_ty == tl.float32,
                )  # fmt: skip
                v_tile = load_parts(
                    v + (b64 * s_v[0] + hk * s_v[2]) * UNIT, j, Sk, s_v[1] * UNIT, s_v[3],
                    BN, DV, V1, V2, True,
                )  # fmt: skip
                dp = dot_rows(do_tile, v_tile, V2, PRECISION)
                keep = 0
                if DROPOUT:
                    keep = kept(seed, rows, j, b * H + h, threshold, BM, BN, False)
                _p, _inner, dz = weight_gradient(
                    z, t, dp, lse_rows[:, None], delta_rows[:, None], keep, keep_scale, SOFTCAP,
                    DROPOUT,
                )  # fmt: skip
                acc += dz
    dmask += first_b.to(tl.int64) * s_dmask[0] + first_h.to(tl.int64) * s_dmask[1]
    rows, keys = i_start + tl.arange(0, BM), j_start + tl.arange(0, BN)
    if ALL_ROWS and ALL_KEYS:
        tl.store(dmask, tl.sum(tl.sum(acc, 1), 0))
    elif ALL_ROWS:
        tl.store(dmask + keys, tl.sum(acc, 0), mask=keys < Sk)
    elif ALL_KEYS:
        tl.store(dmask + rows.to(tl.int64), tl.sum(acc, 1), mask=rows < S)
    else:
        pointers = dmask + rows.to(tl.int64)[:, None] * Sk + keys[None, :]
        tl.store(pointers, acc, mask=(rows < S)[:, None] & (keys < Sk)[None, :])
