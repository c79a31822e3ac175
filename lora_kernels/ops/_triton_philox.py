# mypy: ignore-errors
"""Keep masks of the counter-based dropout inside the Triton kernels of every op.

Definition: lora_kernels/ops/_philox.py (Philox4x32-7; Salmon et al., SC 2011). Element (row m,
column k) of group member `stream` has

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (16 * (k // 128) + (k % 32) // 2,  m,  stream,  0)
    word    = (k % 128) // 32,  half = k % 2,  keep <=> u16 >= round(p * 65536)

so the sixteen counters of a row of 128 columns give four words, word w belongs to the 32 columns
from 32 w on, and its halves to neighbouring columns: joining the two halves of a [rows, 16] tile
of words and reshaping gives a [rows, 32] tile in column order, without moving data between
threads. Work: 14 widening 32-bit products and 14 three-way xors per 8 columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

_MUL0 = tl.constexpr(0xD2511F53)
_MUL1 = tl.constexpr(0xCD9E8D57)
_WEYL0 = tl.constexpr(0x9E3779B9)
_WEYL1 = tl.constexpr(0xBB67AE85)
_ROUNDS = tl.constexpr(7)


@triton.jit
def philox_words(seed, c0, c1, stream):
    """The four words of counters (c0, c1, stream, 0); c0 and c1 broadcast, uint32."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    x0 = c0 + (c1 & 0)
    x1 = c1 + (c0 & 0)
    x2 = (x0 & 0) ^ stream
    x3 = x0 & 0
    for _ in tl.static_range(_ROUNDS):
        # One 64-bit product is one widening multiply; two 32-bit ones would be two.
        p0 = x0.to(tl.uint64) * _MUL0
        p1 = x2.to(tl.uint64) * _MUL1
        x0 = (p1 >> 32).to(tl.uint32) ^ x1 ^ k0
        x2 = (p0 >> 32).to(tl.uint32) ^ x3 ^ k1
        x1 = p1.to(tl.uint32)
        x3 = p0.to(tl.uint32)
        k0 = tl.add(k0, _WEYL0, sanitize_overflow=False)
        k1 = tl.add(k1, _WEYL1, sanitize_overflow=False)
    return x0, x1, x2, x3


@triton.jit
def keep_of_word(word, threshold):
    """Keep mask [R, 2 C], int1, from words [R, C]: each word decides two neighbouring columns."""
    low = (word & 0xFFFF).to(tl.int32) >= threshold
    high = (word >> 16).to(tl.int32) >= threshold
    return tl.reshape(tl.join(low, high), (word.shape[0], 2 * word.shape[1]))


@triton.jit
def keep_tile(seed, rows, first, stream, threshold, R: tl.constexpr, C: tl.constexpr):
    """Keep mask [R, C], int1, of rows [R] and the C columns from `first` on: 32 columns from a
    multiple of 32, 64 from a multiple of 64, or a multiple of 128 from a multiple of 128."""
    counters: tl.constexpr = C // 8 if C >= 128 else 16
    lane = (16 * (first // 128) + tl.arange(0, counters)).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(seed, lane[None, :], rows.to(tl.uint32)[:, None], stream)
    if C == 32:  # one word of each counter; the other three belong to other tiles
        word = (first % 128) // 32
        low = tl.where(word == 0, w0, w1)
        high = tl.where(word == 2, w2, w3)
        return keep_of_word(tl.where(word < 2, low, high), threshold)
    elif C == 64:  # two words of each counter
        lower = first % 128 == 0
        k0 = keep_of_word(tl.where(lower, w0, w2), threshold).to(tl.int8)
        k1 = keep_of_word(tl.where(lower, w1, w3), threshold).to(tl.int8)
        return tl.reshape(tl.permute(tl.join(k0, k1), (0, 2, 1)), (R, C)) != 0
    else:
        # Bytes, not int32, where a layout makes the tile go through shared memory.
        k0 = tl.reshape(keep_of_word(w0, threshold).to(tl.int8), (R, C // 128, 32))
        k1 = tl.reshape(keep_of_word(w1, threshold).to(tl.int8), (R, C // 128, 32))
        k2 = tl.reshape(keep_of_word(w2, threshold).to(tl.int8), (R, C // 128, 32))
        k3 = tl.reshape(keep_of_word(w3, threshold).to(tl.int8), (R, C // 128, 32))
        # [row, block, column in word, w // 2, w % 2] -> [row, block, w // 2, w % 2, column]
        joined = tl.join(tl.join(k0, k2), tl.join(k1, k3))
        return tl.reshape(tl.permute(joined, (0, 1, 3, 4, 2)), (R, C)) != 0
