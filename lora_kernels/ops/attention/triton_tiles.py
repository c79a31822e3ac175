# mypy: ignore-errors
"""Tiles of the attention kernels: where a program's rows are, which keys they see, how to load.

A head of D columns is one part of D1 columns, or two of D1 and D2, each a power of two: 80 is
64 + 16 and 192 is 128 + 64, where one power of two would be 128 and 256. Columns past D are zero.
Strides but those of columns come divided by UNIT, so that the compiler knows how addresses are
aligned (it asks integers for multiples of 16 only; a head of 40 or 72 columns has multiples of 8).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(tile_ends, tile, B):
    """(sequence, tile within it); tile_ends [B]: how many tiles the sequences up to b have."""
    low, high = B - B, B - 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(tile_ends + middle) > tile:
            high = middle
        else:
            low = middle + 1
    before = tl.load(tile_ends + tl.maximum(low - 1, 0))
    return low, tile - tl.where(low > 0, before, 0)


@triton.jit
def key_range(
    i0, S, Sk, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """(low, full_low, full_high, high): keys that any of the rows [i0, i0 + BM) sees, and between
    full_low and full_high tiles that all of them see."""
    first = i0 + Sk - S
    last = tl.minimum(i0 + BM, S) - 1 + Sk - S
    low, full_low, high, full_high = 0, 0, Sk, Sk // BN * BN
    if HAS_LEFT:
        low = tl.maximum(first - left, 0) // BN * BN
        full_low = tl.cdiv(tl.maximum(last - left, 0), BN) * BN
    if HAS_RIGHT:
        high = tl.minimum(tl.maximum(last + right + 1, 0), Sk)
        full_high = tl.minimum(full_high, tl.maximum(first + right + 1, 0) // BN * BN)
    return low, full_low, full_high, high


@triton.jit
def row_range(
    j0, S, Sk, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """(low, high): rows that see any of the keys [j0, j0 + BN); low is the start of a tile."""
    low, high = 0, S
    if HAS_RIGHT:
        low = tl.maximum(j0 - (Sk - S) - right, 0) // BM * BM
    if HAS_LEFT:
        last = tl.minimum(j0 + BN, Sk) - 1 - (Sk - S)
        high = tl.minimum(tl.maximum(last + left + 1, 0), S)
    return low, high


@triton.jit
def _part(base, first, limit, s_row, s_col, R: tl.constexpr, FIRST: tl.constexpr,
          WIDTH: tl.constexpr, D: tl.constexpr, CHECK: tl.constexpr):  # fmt: skip
    rows, columns = tl.arange(0, R), FIRST + tl.arange(0, WIDTH)
    pointers = base + (rows[:, None] * s_row + columns[None, :] * s_col)
    if CHECK and FIRST + WIDTH > D:
        inside = (first + rows < limit)[:, None] & (columns < D)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    elif CHECK:
        return tl.load(pointers, mask=(first + rows < limit)[:, None], other=0.0)
    elif FIRST + WIDTH > D:
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_parts(base, first, limit, s_row, s_col, R: tl.constexpr, D: tl.constexpr,
               D1: tl.constexpr, D2: tl.constexpr, CHECK: tl.constexpr):  # fmt: skip
    """Tuple of one or two tiles [R, D1 or D2], of the rows from `first` on; those from `limit` on
    are zero if CHECK."""
    base += tl.cast(first, tl.int64) * s_row
    one = _part(base, first, limit, s_row, s_col, R, 0, D1, D, CHECK)
    if D2 == 0:
        return (one,)
    else:
        return one, _part(base, first, limit, s_row, s_col, R, D1, D2, D, CHECK)


@triton.jit
def _store_part(base, first, limit, s_row, tile, R: tl.constexpr, FIRST: tl.constexpr,
                WIDTH: tl.constexpr, D: tl.constexpr):  # fmt: skip
    rows, columns = tl.arange(0, R), FIRST + tl.arange(0, WIDTH)
    inside = (first + rows < limit)[:, None]
    if FIRST + WIDTH > D:
        inside = inside & (columns < D)[None, :]
    pointers = base + (rows[:, None] * s_row + columns[None, :])
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def store_parts(base, first, limit, s_row, tiles, R: tl.constexpr, D: tl.constexpr,
                D1: tl.constexpr, D2: tl.constexpr):  # fmt: skip
    """The rows [first, first + R) below `limit`, of contiguous columns."""
    base += tl.cast(first, tl.int64) * s_row
    _store_part(base, first, limit, s_row, tiles[0], R, 0, D1, D)
    if D2 != 0:
        _store_part(base, first, limit, s_row, tiles[1], R, D1, D2, D)


@triton.jit
def zero_parts(R: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Accumulators [R, D1] and [R, D2]."""
    if D2 == 0:
        return (tl.zeros((R, D1), tl.float32),)
    else:
        return tl.zeros((R, D1), tl.float32), tl.zeros((R, D2), tl.float32)


@triton.jit
def dot_rows(a, b, D2: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over the parts of both, fp32."""
    z = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if D2 != 0:
        z = tl.dot(a[1], tl.trans(b[1]), z, input_precision=PRECISION)
    return z


@triton.jit
def add_dot(acc, left, right, D2: tl.constexpr, PRECISION: tl.constexpr):
    """acc + left right, part by part of right."""
    one = tl.dot(left, right[0], acc[0], input_precision=PRECISION)
    if D2 == 0:
        return (one,)
    else:
        return one, tl.dot(left, right[1], acc[1], input_precision=PRECISION)


@triton.jit
def scale_parts(acc, factor, D2: tl.constexpr):
    """Every part times `factor`, which broadcasts."""
    if D2 == 0:
        return (acc[0] * factor,)
    else:
        return acc[0] * factor, acc[1] * factor
