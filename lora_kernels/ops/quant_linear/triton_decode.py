# mypy: ignore-errors
"""Tiles of W out of the packed parts, in fp32: what every kernel on quantized weights starts from.

Math       formats.py: every product rounded, nothing contracted, so launches of kernels that
           decode set enable_fp_fusion=False. Callers round once, to the dtype they need.
Shapes     a tile is [R, C]: rows r0 ... of W (out features) and columns c0 ... (in features), for
           any extents of W. Elements outside of W come out as some finite number.
Bytes      the packed data of the tile, once. Statistics: FAST, one scale per row of the tile, or
           one load per element, for blocks that straddle rows, act-order and odd block sizes.
Numerics   byte for byte those of the reference. An e4m3 byte becomes the fp32 of the same exponent
           field and 2**-120 times its value, a subnormal one for a subnormal one (neither ptxas nor
           the AMD backend flushes those here). No hardware support for fp8 is needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.ops.quant_linear import formats

_FLAT = tl.constexpr(formats.FLAT)
_INT8_ROW = tl.constexpr(formats.INT8_ROW)
_GPTQ = tl.constexpr(formats.GPTQ)
_GPTQ_V1 = tl.constexpr(formats.GPTQ_V1)
_AWQ = tl.constexpr(formats.AWQ)
_FP8_TENSOR = tl.constexpr(formats.FP8_TENSOR)
_FP8_ROW = tl.constexpr(formats.FP8_ROW)
_TWO_TO_120 = tl.constexpr(2.0**120)
_RECIPROCAL = tl.constexpr(formats.INT8_RECIPROCAL)
# Nibble j: which of the eight int4 of a word element j is.
_IN_ORDER = tl.constexpr(sum(j << 4 * j for j in range(formats.PER_INT32)))
_AWQ_ORDER = tl.constexpr(sum(i << 4 * j for i, j in enumerate(formats.AWQ_ORDER)))


@triton.jit
def absmax_of(parts, block, inside, NESTED: tl.constexpr):
    """fp32 statistics of the flat layout for blocks [...]; zero where not `inside`."""
    if NESTED:
        code = tl.load(parts[1] + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(parts[3] + block // NESTED, mask=inside, other=0.0)
        return tl.load(parts[4] + code) * scale + tl.load(parts[5])
    else:
        return tl.load(parts[1] + block, mask=inside, other=0.0)


@triton.jit
def _nth(words, j: tl.constexpr, ORDER: tl.constexpr):
    return (words >> (4 * ((ORDER >> (4 * j)) & 7))) & 0xF


@triton.jit
def _int4_of_words(words, ORDER: tl.constexpr):
    """[A, B] words -> [A, 8 B] codes, without moving anything between threads."""
    even = tl.join(
        tl.join(_nth(words, 0, ORDER), _nth(words, 4, ORDER)),
        tl.join(_nth(words, 2, ORDER), _nth(words, 6, ORDER)),
    )
    odd = tl.join(
        tl.join(_nth(words, 1, ORDER), _nth(words, 5, ORDER)),
        tl.join(_nth(words, 3, ORDER), _nth(words, 7, ORDER)),
    )
    return tl.reshape(tl.join(even, odd), (words.shape[0], 8 * words.shape[1]))


@triton.jit
def _e4m3(byte):
    wide = byte.to(tl.int32)
    bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
    value = bits.to(tl.float32, bitcast=True) * _TWO_TO_120
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _flat(
    parts, r, c, c0, N, K,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, FAST: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    if FAST:
        first = r.to(tl.int64) * K + c0
        byte = (first // 2)[:, None] + tl.arange(0, C // 2)[None, :]
        inside = r < N
        packed = tl.load(parts[0] + byte, mask=inside[:, None], other=0)
        scale = absmax_of(parts, first // BLOCK, inside, NESTED)
    else:
        element = r.to(tl.int64)[:, None] * K + c[None, :]
        inside = (r < N)[:, None] & (c < K)[None, :]
        packed = tl.load(parts[0] + element // 2, mask=inside, other=0)
        packed = tl.where(element % 2 == 0, packed >> 4, packed & 0xF)
        scale = absmax_of(parts, element // BLOCK, inside, NESTED)
    return packed, scale, scale


@triton.jit
def _int4(
    parts, r, c, r0, c0, N, K, LAYOUT: tl.constexpr, BLOCK: tl.constexpr,
    ACT_ORDER: tl.constexpr, FAST: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    words_n = tl.cdiv(N, 8)
    if LAYOUT == _AWQ:
        order: tl.constexpr = _AWQ_ORDER
        word = r0 // 8 + tl.arange(0, R // 8)
        inside = (c < K)[:, None] & (word < words_n)[None, :]
        source = parts[0] + c.to(tl.int64)[:, None] * words_n + word[None, :]
    else:
        order: tl.constexpr = _IN_ORDER
        word = c0 // 8 + tl.arange(0, C // 8)
        inside = (r < N)[:, None] & (word < tl.cdiv(K, 8))[None, :]
        source = parts[0] + word.to(tl.int64)[None, :] * N + r[:, None]
    packed = tl.load(source, mask=inside, other=0)
    shift = 4 * ((order >> (4 * (r % 8))) & 7)
    if FAST:
        group = c0 // BLOCK
        inside = r < N
        zero = tl.load(parts[1] + group * words_n + r // 8, mask=inside, other=0)
        scale = tl.load(parts[2] + group * N + r, mask=inside, other=0.0)
        zero = (zero >> shift) & 0xF
    else:
        group = tl.load(parts[3] + c, mask=c < K, other=0) if ACT_ORDER else c // BLOCK
        inside = (r < N)[:, None] & (c < K)[None, :]
        of_group = group.to(tl.int64)[None, :]
        zero = tl.load(parts[1] + of_group * words_n + (r // 8)[:, None], mask=inside, other=0)
        scale = tl.load(parts[2] + of_group * N + r[:, None], mask=inside, other=0.0)
        zero = (zero >> shift[:, None]) & 0xF
    if LAYOUT == _GPTQ_V1:
        zero += 1
    return packed, scale.to(tl.float32), zero


@triton.jit
def _bytes(parts, r, c, c0, N, K, LAYOUT: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr):
    """int8 and fp8."""
    inside = (r < N)[:, None] & (c < K)[None, :]
    packed = tl.load(parts[0] + r.to(tl.int64)[:, None] * K + c[None, :], mask=inside, other=0)
    if LAYOUT == _INT8_ROW or LAYOUT == _FP8_ROW:  # noqa: SIM109 - a constexpr
        scale = tl.load(parts[1] + r, mask=r < N, other=0.0)
    elif LAYOUT == _FP8_TENSOR:
        scale = tl.load(parts[1] + r * 0)
    else:
        first = parts[1] + (r // BLOCK) * tl.cdiv(K, BLOCK)
        if FAST:
            scale = tl.load(first + c0 // BLOCK, mask=r < N, other=0.0)
        else:
            scale = tl.load(first[:, None] + (c // BLOCK)[None, :], mask=inside, other=0.0)
    return packed, scale, scale


@triton.jit
def fetch(
    parts, r0, c0, N, K, LAYOUT: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    ACT_ORDER: tl.constexpr, FAST: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """(packed data, scales, zero points) of W[r0 : r0 + R, c0 : c0 + C]: all of its loads; r0 is a
    multiple of R, c0 of C. `parts` as in formats.parts_of, the fp8 data as bytes; BLOCK is
    spec.block_size; FAST as configs.is_fast."""
    r = r0 + tl.arange(0, R)
    c = c0 + tl.arange(0, C)
    if LAYOUT == _FLAT:
        return _flat(parts, r, c, c0, N, K, BLOCK, NESTED, FAST, C)
    elif LAYOUT == _AWQ or LAYOUT == _GPTQ or LAYOUT == _GPTQ_V1:  # noqa: SIM109
        return _int4(parts, r, c, r0, c0, N, K, LAYOUT, BLOCK, ACT_ORDER, FAST, R, C)
    else:
        return _bytes(parts, r, c, c0, N, K, LAYOUT, BLOCK, FAST)


@triton.jit
def code_of(parts, LAYOUT: tl.constexpr):
    """The sixteen values of the flat layout, for :func:`values`."""
    return tl.load(parts[2] + tl.arange(0, 16)) if LAYOUT == _FLAT else 0


@triton.jit
def values(tile, code, LAYOUT: tl.constexpr, FAST: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """fp32 [R, C] of what :func:`fetch` returned."""
    packed, scale, zero = tile
    if FAST:
        scale = scale[:, None]
        zero = zero[:, None]
    if LAYOUT == _FLAT:
        nibble = tl.reshape(tl.join(packed >> 4, packed & 0xF), (R, C)) if FAST else packed
        # The table is in sixteen banks of shared memory: no conflicts, whatever the nibbles.
        index = tl.reshape(nibble.to(tl.int32), (R * C,))
        return tl.reshape(tl.gather(code, index, 0), (R, C)) * scale
    elif LAYOUT == _AWQ:
        return (tl.trans(_int4_of_words(packed, _AWQ_ORDER)) - zero).to(tl.float32) * scale
    elif LAYOUT == _GPTQ or LAYOUT == _GPTQ_V1:  # noqa: SIM109
        return (_int4_of_words(packed, _IN_ORDER) - zero).to(tl.float32) * scale
    elif LAYOUT == _INT8_ROW:
        return packed.to(tl.float32) * scale * _RECIPROCAL
    else:
        return _e4m3(packed) * scale
