# mypy: ignore-errors
"""Scores of one tile from its products q k, in units of log 2: bias, mask, window, softcap.

    z = scale q k,  then c tanh(z / c),  - a |i + Sk - S - j|,  + b,  -inf where hidden;  z / ln 2

so that the exponential of the softmax is a power of two. A tile is [rows, keys], or its transpose:
`rows` and `keys` come shaped to broadcast.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.ops._triton_philox import keep_tile

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """tanh to a few units of the last place (EXACT), or to 1e-7 of 1: enough for 16-bit inputs."""
    # e^(2x) of a large x is inf and the quotient 0; of a very negative one 0 and the quotient 2.
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    if not EXACT:
        return far
    # The difference above cancels near 0. Odd polynomial of the Cephes library (tanhf) there.
    y = x * x
    near = -5.70498872745e-3 * y + 2.06390887954e-2
    near = near * y - 5.37397155531e-2
    near = near * y + 1.33314422036e-1
    near = near * y - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, x + x * y * near, far)


@triton.jit
def scores(
    products, rows, keys, S, Sk, left, right, scale, softcap, slope, mask, s_mask_row, s_mask_key,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, EDGE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """(z, tanh or z). EDGE: a part of the tile may lie outside of the window or past the keys.
    MASK: 0 none, 1 boolean as bytes, 2 additive; `mask` points to the matrix of the head."""
    if SOFTCAP:
        t = tanh(products * (scale / softcap), EXACT)
        z = t * (softcap * LOG2_E)
    else:
        z = products * (scale * LOG2_E)
        t = z
    if ALIBI:
        z -= (slope * LOG2_E) * tl.abs(rows + (Sk - S) - keys).to(tl.float32)
    if MASK != 0:
        pointers = mask + rows.to(tl.int64) * s_mask_row + keys.to(tl.int64) * s_mask_key
        b = tl.load(pointers, mask=(rows < S) & (keys < Sk), other=0)
        if MASK == 1:
            z = tl.where(b != 0, z, float("-inf"))
        else:
            z += b.to(tl.float32) * LOG2_E
    if EDGE:
        seen = keys < Sk
        if HAS_LEFT:
            seen = seen & (keys >= rows + (Sk - S) - left)
        if HAS_RIGHT:
            seen = seen & (keys <= rows + (Sk - S) + right)
        z = tl.where(seen, z, float("-inf"))
    return z, t


@triton.jit
def kept(seed, rows, first_key, stream, threshold, R: tl.constexpr, C: tl.constexpr,
         TRANSPOSED: tl.constexpr):  # fmt: skip
    """Which weights dropout keeps, [R, C] or its transpose; `rows` [R], keys from first_key on."""
    keep = keep_tile(seed, rows, first_key, stream, threshold, R, C)
    if TRANSPOSED:
        return tl.trans(keep.to(tl.int8)) != 0
    else:
        return keep


@triton.jit
def log_sum_of_rows(lse, rows, S):
    """lse / ln 2 of `rows`; inf for rows that see nothing or do not exist: weights of 0."""
    value = tl.load(lse + rows, mask=rows < S, other=float("inf"))
    return tl.where(value == float("-inf"), float("inf"), value * LOG2_E)
