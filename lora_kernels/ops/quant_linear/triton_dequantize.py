# mypy: ignore-errors
"""Dequantization in one launch, nested statistics included.

Math       formats.py; the result is rounded once, to the dtype of `out`.
Shapes     flat: out [n], any n, read as one axis whatever its shape; rows: out [N, K] contiguous.
Grid       flat: (ceil(n / (8 T)),), a thread takes eight neighbouring elements: four bytes in, one
           store of 16 bytes out for a 16-bit dtype, and one scale, as no block is shorter and none
           begins between them. rows: (N tiles, K tiles) of :func:`triton_decode.decode`.
Bytes      packed data and statistics once, out once: 0.52 + 2 bytes per element of nf4 in bf16.
           Bound by the stores.
Numerics   those of triton_decode.py; launched with enable_fp_fusion=False.
Limits     an odd tail, or n that is no multiple of eight, is stored by element (EVEN is false).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.ops.quant_linear.triton_decode import absmax_of, fetch, values


@triton.jit
def dequantize_flat(
    parts, out, n, BLOCK: tl.constexpr, NESTED: tl.constexpr, EVEN: tl.constexpr, T: tl.constexpr
):
    unit = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    byte = unit[:, None] * 4 + tl.arange(0, 4)[None, :]
    inside = unit * 8 < n
    if EVEN:
        packed = tl.load(parts[0] + byte, mask=inside[:, None], other=0)
    else:
        packed = tl.load(parts[0] + byte, mask=byte * 2 < n, other=0)
    nibble = tl.reshape(tl.join(packed >> 4, packed & 0xF), (T, 8))
    scale = absmax_of(parts, unit * 8 // BLOCK, inside, NESTED)
    value = tl.load(parts[2] + nibble.to(tl.int32)) * scale[:, None]
    element = unit[:, None] * 8 + tl.arange(0, 8)[None, :]
    if EVEN:
        tl.store(out + element, value.to(out.dtype.element_ty), mask=inside[:, None])
    else:
        tl.store(out + element, value.to(out.dtype.element_ty), mask=element < n)


@triton.jit
def dequantize_rows(
    parts, out, N, K, LAYOUT: tl.constexpr, BLOCK: tl.constexpr, ACT_ORDER: tl.constexpr,
    FAST: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n0, k0 = tl.program_id(0) * BN, tl.program_id(1) * BK
    tile = fetch(parts, n0, k0, N, K, LAYOUT, BLOCK, 0, ACT_ORDER, FAST, BN, BK)
    w = values(tile, 0, LAYOUT, FAST, BN, BK)
    n, k = n0 + tl.arange(0, BN), k0 + tl.arange(0, BK)
    pointers = out + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(pointers, w.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
