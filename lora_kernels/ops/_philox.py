"""Counter-based dropout: the one definition that every backend reproduces bit for bit.

The keep decision of element (row m, column k) of the flattened input [M, K] of adapter `stream`
depends on nothing but (seed, m, k, stream, p), so no mask is stored, a recomputed forward
(activation checkpointing) draws the same mask, and any tiling gives the same result.

Generator: Philox4x32 with 7 rounds (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy
as 1, 2, 3", SC 2011; 7 rounds is the least that passes BigCrush there).

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (16 * (k // 128) + (k % 32) // 2,  m,  stream,  0)
    word    = (k % 128) // 32          one of the four 32-bit outputs
    half    = k % 2                    its low (0) or high (1) 16 bits
    keep   <=> u16 >= round(p * 65536)

One call serves eight columns; the layout puts 32 neighbouring columns into 16 neighbouring
lanes (AVX-512) and each thread's pairs of an mma.sync operand into one counter (CUDA).
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 7
_MUL0, _MUL1 = 0xD2511F53, 0xCD9E8D57
_WEYL0, _WEYL1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
# Counters drawn at a time, on the CPU and on a GPU: bounds the int64 temporaries.
_COUNTERS = {False: 1 << 17, True: 1 << 22}


def threshold(p: float) -> int:
    """Smallest 16-bit draw that is kept."""
    return round(p * 65536)


def keep_scale(p: float) -> float:
    """1 / P(keep), for the probability that 16 bits really give; 0 when nothing is kept."""
    drop = threshold(p) / 65536
    return 0.0 if drop >= 1.0 else 1.0 / (1.0 - drop)


def _mulhilo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    product = a * b  # wraps modulo 2**64, which keeps all 64 bits of a 32x32 product
    return (product >> 32) & _LOW, product & _LOW


def philox4x32(key: tuple[Tensor, Tensor], counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four 32-bit words (held in int64) for each counter; operands broadcast."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        hi0, lo0 = _mulhilo(c0, _MUL0)
        hi1, lo1 = _mulhilo(c2, _MUL1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL0) & _LOW, (k1 + _WEYL1) & _LOW
    return c0, c1, c2, c3


def keep_mask(
    seed: Tensor, rows: int, columns: int, p: float, stream: int = 0, first_row: int = 0
) -> Tensor:
    """Boolean keep mask [rows, columns] on the device of `seed` (int64, one element), of the rows
    from `first_row` on."""
    step = max(1, _COUNTERS[seed.is_cuda] // max(16 * -(-columns // 128), 1))
    if rows <= step:
        return _mask_of_rows(seed, first_row, rows, columns, p, stream)
    mask = torch.empty(rows, columns, dtype=torch.bool, device=seed.device)
    for i in range(0, rows, step):
        count = min(step, rows - i)
        mask[i : i + count] = _mask_of_rows(seed, first_row + i, count, columns, p, stream)
    return mask


def _mask_of_rows(
    seed: Tensor, first_row: int, rows: int, columns: int, p: float, stream: int
) -> Tensor:
    device = seed.device
    seed = seed.reshape(())
    blocks = -(-columns // 128)
    lane = torch.arange(16 * blocks, device=device, dtype=torch.int64)[None, :]
    row = torch.arange(first_row, first_row + rows, device=device, dtype=torch.int64)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    # Not broadcast to [rows, lanes] here: the first two rounds then work on rows and lanes alone.
    words = philox4x32((seed & _LOW, (seed >> 32) & _LOW), (lane, row, zero + stream, zero))
    least = threshold(p)
    kept = [torch.stack([(w & 0xFFFF) >= least, (w >> 16) >= least], -1) for w in words]
    # [rows, 16 * blocks, half] per word -> column 128 * block + 32 * word + 2 * lane + half
    parts = [k.view(rows, blocks, 32) for k in kept]
    return torch.stack(parts, 2).view(rows, 128 * blocks)[:, :columns]


def drop(x: Tensor, seed: Tensor, p: float, stream: int = 0, first_row: int = 0) -> Tensor:
    """x [M, K] with dropped elements zero; the factor :func:`keep_scale` is left to the caller."""
    mask = keep_mask(seed.to(x.device), x.shape[0], x.shape[1], p, stream, first_row)
    return x.masked_fill(~mask, 0.0)
