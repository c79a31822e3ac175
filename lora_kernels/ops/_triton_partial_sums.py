# mypy: ignore-errors
"""Sums over the first axis of fp32 partial results, the second pass of sums without atomics.

Math       out_g[i] = sum over p < count_g of part_g[p, i], for several results in one launch
Shapes     part_g [count_g, length_g] fp32 contiguous, out_g [length_g] in any dtype
Grid       programs of BLOCK elements of one result; a program adds P rows of part at a time
           into P sums per element, which are added in the end: a tree of fixed shape.
Bytes      every part once, every result once.
Numerics   fp32, rounded once to the dtype of the result. Bitwise reproducible.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_partials(
    parts, outs, counts, lengths, first_blocks,
    G: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    for g in tl.static_range(G):
        block = program - first_blocks[g]
        if (block >= 0) & (block * BLOCK < lengths[g]):
            i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = (i < lengths[g])[None, :]
            total = tl.zeros((P, BLOCK), tl.float32)
            for first in tl.range(0, counts[g], P):
                p = first + tl.arange(0, P)[:, None]
                source = parts[g] + p.to(tl.int64) * lengths[g] + i[None, :]
                total += tl.load(source, mask=inside & (p < counts[g]), other=0.0)
            out = outs[g]
            tl.store(
                out + i, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=i < lengths[g]
            )  # fmt: skip
