# mypy: ignore-errors
"""Quantization: the statistics of a block and the nearest code of each of its elements.

Math       formats.py and the formulas of the reference, whose bytes come out: IEEE divisions,
           nothing contracted (enable_fp_fusion=False), ties to the lower value.
Shapes     flat: w [n] -> packed u8 [ceil(n / 2)], absmax f32 [blocks]. nested: absmax [blocks] ->
           codes u8 [blocks], nested_absmax [ceil(blocks / 256)]. rows: w [N, K] -> packed [N, K],
           scale [N].
Grid       flat: a program takes G blocks. nested: one block of 256. rows: one row, read twice, the
           second time from the cache.
Bytes      w once, packed and statistics once. Nearest of 16: fifteen comparisons per element, which
           is below the time of the loads; nearest of 256: eight steps of bisection.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and taking it away rounds to even


@triton.jit
def _divided(x, y):
    """x / y in fp32, rounded as IEEE has it: `/` is an approximation on GPUs."""
    return tl.math.div_rn(tl.cast(x, tl.float32), tl.cast(y, tl.float32))


@triton.jit
def quantize_flat(
    w, middles, order, packed, absmax, n, least,
    BLOCK: tl.constexpr, G: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(w + element, mask=element < n, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 1)
    limited = tl.maximum(largest, least)
    scaled = x * _divided(1.0, limited)[:, None]
    if PARTIAL:  # the elements of a last, partial block are divided
        broken = (block == n // BLOCK)[:, None]
        by = tl.broadcast_to(limited[:, None], (G, BLOCK))
        scaled = tl.where(broken, _divided(x, by), scaled)
    rank = tl.zeros((G, BLOCK), tl.int32)
    for i in tl.static_range(15):
        rank += (scaled > tl.load(middles + i)).to(tl.int32)
    code = tl.load(order + rank)
    high, low = tl.split(tl.reshape(code, (G, BLOCK // 2, 2)))
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed + byte, (high << 4) | low, mask=byte < (n + 1) // 2)
    tl.store(absmax + block, largest, mask=block * BLOCK < n)


@triton.jit
def quantize_nested(absmax, middles, offset, codes, nested_absmax, blocks, least, B: tl.constexpr):
    program = tl.program_id(0)
    i = program * B + tl.arange(0, B)
    inside = i < blocks
    x = tl.load(absmax + i, mask=inside, other=0.0) - tl.load(offset)
    x = tl.where(inside, x, 0.0)
    largest = tl.max(tl.abs(x), 0)
    scaled = x * _divided(1.0, tl.maximum(largest, least))
    code = tl.zeros((B,), tl.int32)
    for halving in tl.static_range(8):
        ahead = code + (128 >> halving)
        code = tl.where(scaled > tl.load(middles + ahead - 1), ahead, code)
    tl.store(codes + i, code.to(tl.uint8), mask=inside)
    tl.store(nested_absmax + program, largest)


@triton.jit
def _e4m3(x):
    """Bytes of e4m3fn nearest to x, |x| <= 448; ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = ((tl.abs(x) * 512.0) + _ROUND) - _ROUND  # multiples of 2**-9
    code = tl.where(tl.abs(x) < 0.015625, small.to(tl.uint32), normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantize_rows(
    w, packed, scales, N, K, largest_code, least, FP8: tl.constexpr, BK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BK,), tl.float32)
    for first in tl.range(0, K, BK):
        k = first + tl.arange(0, BK)
        x = tl.load(w + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    absmax = tl.max(largest, 0)
    if FP8:
        scale = tl.where(absmax == 0.0, 1.0, tl.maximum(_divided(absmax, largest_code), least))
    else:
        scale = absmax
        factor = _divided(1.0, tl.where(absmax == 0.0, 1.0, absmax)) * largest_code  # two roundings
        factor = tl.minimum(factor, 3.4028234663852886e38)
    for first in tl.range(0, K, BK):
        k = first + tl.arange(0, BK)
        x = tl.load(w + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        if FP8:
            x = _divided(x, scale)
            x = tl.minimum(tl.maximum(x, -largest_code), largest_code)
            tl.store(packed + row * K + k, _e4m3(x), mask=k < K)
        else:
            x = ((x * factor) + _ROUND) - _ROUND
            x = tl.minimum(tl.maximum(x, -largest_code), largest_code)
            tl.store(packed + row * K + k, x.to(tl.int8), mask=k < K)
    tl.store(scales + row, scale)
