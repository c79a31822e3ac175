# mypy: ignore-errors
"""Attention of a few queries over a cache, the keys of a sequence split over programs.

Math       as triton_forward.py, for the keys of a split; then, over the splits n of a row,
           O = sum_n 2^(l_n - m) O_n / (2^(t - m) + sum_n 2^(l_n - m)),  l_n = log2-sum-exp2 of n
Shapes     q [B, S, H, D] in any strides; caches [B, C, Hk, D] or pages [P, page, Hk, D]; partial
           results fp32, O_n [splits, B, S, H, Dv] and l_n [splits, B, H, S]; out contiguous.
Grid       decode: (row tiles of all B Hk groups, splits). A program's rows are the S queries of all
           heads of a group, so a key is read once for the group; a split is an equal share of the
           tiles of keys that the sequence has. combine: a program per row.
Bytes      the sequence's keys and values once; 8 (Dv + 1) H S splits for the partial results.
Numerics   fp32, weights rounded to the dtype of v; splits are added in one order. A length or a
           page out of range gives NaN, never another address.
Source     Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.ops.attention.triton_scores import LN_2, LOG2_E, scores
from lora_kernels.ops.attention.triton_tiles import add_dot, dot_rows, scale_parts, zero_parts


@triton.jit
def _gather_part(base, offsets, inside, s_col, FIRST: tl.constexpr, WIDTH: tl.constexpr,
                 D: tl.constexpr):  # fmt: skip
    columns = FIRST + tl.arange(0, WIDTH)
    inside = inside[:, None]
    if FIRST + WIDTH > D:
        inside = inside & (columns < D)[None, :]
    return tl.load(base + offsets[:, None] + columns[None, :] * s_col, mask=inside, other=0.0)


@triton.jit
def gather_parts(base, offsets, inside, s_col, D: tl.constexpr, D1: tl.constexpr,
                 D2: tl.constexpr):  # fmt: skip
    """Parts of the rows at `offsets`; zero where not `inside`."""
    one = _gather_part(base, offsets, inside, s_col, 0, D1, D)
    if D2 == 0:
        return (one,)
    else:
        return one, _gather_part(base, offsets, inside, s_col, D1, D2, D)


@triton.jit(do_not_specialize=["S", "capacity", "pages", "left", "right", "splits"])
def decode(
    q, k, v, out, lse, sinks, slopes, lengths, table, s_q, s_k, s_v, s_slope, s_table, B, S, H, HK,
    GROUP, capacity, pages, page, left, right, scale, softcap, splits,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr,
    V2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    PAGED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, ALIBI: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PARTIAL: the result of a split, without sinks; else the whole."""
    tiles = tl.cdiv(S * GROUP, BM)
    tile, owner = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    split = tl.program_id(1)
    b, hk = owner // HK, owner % HK
    b64, hk64 = b.to(tl.int64), hk.to(tl.int64)
    n = tl.load(lengths + b).to(tl.int32)
    bad = (n < 0) | (n > capacity)
    n = tl.where(bad, 0, n)
    row = tile * BM + tl.arange(0, BM)
    exists = row < S * GROUP
    i, h = row % S, hk * GROUP + row // S
    h = tl.where(exists, h, hk * GROUP)
    q_rows = (b64 * s_q[0] + i.to(tl.int64) * s_q[1] + h.to(tl.int64) * s_q[2]) * UNIT
    q_tile = gather_parts(q, q_rows, exists, s_q[3], D, D1, D2)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + b * s_slope[0] + h * s_slope[1]).to(tl.float32)[:, None]
    acc = zero_parts(BM, V1, V2)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if SINKS and not PARTIAL:
        top = tl.load(sinks + h).to(tl.float32) * LOG2_E
        total += tl.where(top == float("-inf"), 0.0, 1.0)
    low, high = 0, n
    if HAS_LEFT:
        low = tl.maximum(n - S - left, 0) // BN * BN
    if HAS_RIGHT:
        high = tl.minimum(tl.maximum(n + right, 0), n)
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BN), splits) * BN
    start = low + split * share
    EXACT: tl.constexpr = k.dtype.element_ty == tl.float32
    for j in tl.range(start, tl.minimum(start + share, high), BN):
        keys = j + tl.arange(0, BN)
        inside = keys < n
        if PAGED:
            index = tl.load(table + b64 * s_table + keys // page, mask=inside, other=0)
            bad |= tl.max(((index < 0) | (index >= pages)).to(tl.int32), 0) != 0
            inside &= (index >= 0) & (index < pages)
            block, at = index.to(tl.int64), keys % page
        else:
            block, at = b64, keys
        k_rows = (block * s_k[0] + at.to(tl.int64) * s_k[1] + hk64 * s_k[2]) * UNIT
        v_rows = (block * s_v[0] + at.to(tl.int64) * s_v[1] + hk64 * s_v[2]) * UNIT
        k_tile = gather_parts(k, k_rows, inside, s_k[3], D, D1, D2)
        z, _ = scores(
            dot_rows(q_tile, k_tile, D2, PRECISION), i[:, None], keys[None, :], S, n, left, right,
            scale, softcap, slope, q, 0, 0,
            SOFTCAP, ALIBI, 0, HAS_LEFT, HAS_RIGHT, True, EXACT,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(z, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        fade = tl.exp2(top - base)
        p = tl.exp2(z - base[:, None])
        total = total * fade + tl.sum(p, 1)
        v_tile = gather_parts(v, v_rows, inside, s_v[3], DV, V1, V2)
        acc = scale_parts(acc, fade[:, None], V2)
        acc = add_dot(acc, p.to(v.dtype.element_ty), v_tile, V2, PRECISION)
        top = new
    total = tl.where(total == 0.0, 1.0, total)  # top is -inf there
    wrong = tl.where(bad, float("nan"), 0.0)
    acc = scale_parts(acc, (1.0 / total + wrong)[:, None], V2)
    result = top + tl.log2(total) + wrong
    if PARTIAL:
        out += split.to(tl.int64) * B * S * H * DV
        lse += split.to(tl.int64) * B * S * H
    else:
        result *= LN_2
    out_rows = ((b64 * S + i) * H + h) * DV
    columns = tl.arange(0, V1)
    one = out + out_rows[:, None] + columns[None, :]
    tl.store(one, acc[0].to(out.dtype.element_ty), mask=exists[:, None] & (columns < DV)[None, :])
    if V2 != 0:
        columns = V1 + tl.arange(0, V2)
        two = out + out_rows[:, None] + columns[None, :]
        inside = exists[:, None] & (columns < DV)[None, :]
        tl.store(two, acc[1].to(out.dtype.element_ty), mask=inside)
    tl.store(lse + (b64 * H + h) * S + i, result, mask=exists)


@triton.jit(do_not_specialize=["B", "S", "splits"])
def combine(
    parts, lse_parts, sinks, out, lse, B, S, H, splits,
    DV: tl.constexpr, V: tl.constexpr, MOST: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One row: query i of head h of sequence b. MOST: `splits` rounded up to a power of two."""
    i, owner = tl.program_id(0) % S, tl.program_id(0) // S
    b, h = owner // H, owner % H
    rows = B.to(tl.int64) * S * H
    at = (b.to(tl.int64) * H + h) * S + i
    n = tl.arange(0, MOST)
    each = tl.load(lse_parts + n * rows + at, mask=n < splits, other=float("-inf"))
    top = tl.max(each, 0)
    sink = top
    if SINKS:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2_E
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(each - base), 0)
    if SINKS:
        total += tl.exp2(sink - base)
    columns = tl.arange(0, V)
    acc = tl.zeros((V,), tl.float32)
    row = (b.to(tl.int64) * S + i) * H + h
    for s in tl.range(0, splits):
        weight = tl.exp2(tl.load(lse_parts + s * rows + at) - base)
        part = parts + (s * rows + row) * DV + columns
        acc += weight * tl.load(part, mask=columns < DV, other=0.0)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * DV + columns, (acc / total).to(out.dtype.element_ty), mask=columns < DV)
    tl.store(lse + at, (top + tl.log2(total)) * LN_2)
