# mypy: ignore-errors
"""The rotation as a Triton kernel: q and k, every head and both parts of it in one launch.

Work       per program one position and HB heads of q or of k; 3 multiply-adds per rotated channel.
Traffic    every head read once and written once; the row of cos and sin once per program, and of a
           position's programs all but the first find it in the cache.
Rounding   fp32 (fp64 for fp64), rounded once to the dtype of the heads; channels from R on are
           copied.
Limits     any strides of the inputs; positions outside of the cache give NaN, as a kernel cannot
           raise.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row(table, offset, inside, sr, R, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, wide):
    """cos or sin of the two channels of every pair, [1, PAIRS] each."""
    nan = float("nan")
    pair = tl.arange(0, PAIRS)
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + R // 2
    there = (pair < R // 2) & inside
    one = tl.load(table + offset + first * sr, mask=there, other=nan).to(wide)
    two = tl.load(table + offset + second * sr, mask=there, other=nan).to(wide)
    return one[None, :], two[None, :]


@triton.jit(do_not_specialize=["positions", "S"])
def rotate(
    heads, outs, cos, sin, ids, S, positions, counts, first_blocks, D, R,
    sbs, sss, shs, sds, scb, scn, scr, ssb, ssn, ssr, sib, sin_,
    G: tl.constexpr, HB: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, HAS_IDS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    block = tl.program_id(1)
    b = (place // S).to(tl.int64)
    n = (place % S).to(tl.int64)
    wide = tl.float64 if WIDE else tl.float32
    if HAS_IDS:
        row = tl.load(ids + b * sib + n * sin_).to(tl.int64)
        inside = (row >= 0) & (row < positions)
        row = tl.where(inside, row, 0)
        at_cos, at_sin = row * scn, row * ssn
    else:
        inside = n >= 0
        at_cos, at_sin = b * scb + n * scn, b * ssb + n * ssn
    c1, c2 = _row(cos, at_cos, inside, scr, R, PAIRS, INTERLEAVED, wide)
    s1, s2 = _row(sin, at_sin, inside, ssr, R, PAIRS, INTERLEAVED, wide)
    pair = tl.arange(0, PAIRS)
    first, second = pair, pair + R // 2
    for g in tl.static_range(G):
        h = (block - first_blocks[g]) * HB + tl.arange(0, HB)
        if (block >= first_blocks[g]) & (block < first_blocks[g + 1]):
            mine = (h < counts[g])[:, None]
            there = mine & (pair < R // 2)[None, :]
            x = heads[g] + b * sbs[g] + n * sss[g] + h.to(tl.int64)[:, None] * shs[g]
            y = outs[g] + (place.to(tl.int64) * counts[g] + h)[:, None] * D
            if INTERLEAVED:  # a pair lies side by side: read and written as it lies
                both = tl.arange(0, 2 * PAIRS)
                lies = mine & (both < R)[None, :]
                tile = tl.load(x + both[None, :] * sds[g], mask=lies, other=0.0).to(wide)
                x1, x2 = tl.split(tl.reshape(tile, (HB, PAIRS, 2)))
            else:
                x1 = tl.load(x + first[None, :] * sds[g], mask=there, other=0.0).to(wide)
                x2 = tl.load(x + second[None, :] * sds[g], mask=there, other=0.0).to(wide)
            if INVERSE:
                y1 = x1 * c1 + x2 * s2
                y2 = x2 * c2 - x1 * s1
            else:
                y1 = x1 * c1 - x2 * s1
                y2 = x2 * c2 + x1 * s2
            kind = outs[g].dtype.element_ty
            if INTERLEAVED:
                turned = tl.reshape(tl.join(y1, y2), (HB, 2 * PAIRS))
                tl.store(y + both[None, :], turned.to(kind), mask=lies)
            else:
                tl.store(y + first[None, :], y1.to(kind), mask=there)
                tl.store(y + second[None, :], y2.to(kind), mask=there)
            if REST > 0:
                channel = R + tl.arange(0, REST)
                left = mine & (channel < D)[None, :]
                rest = tl.load(x + channel[None, :] * sds[g], mask=left, other=0.0)
                tl.store(y + channel[None, :], rest, mask=left)
