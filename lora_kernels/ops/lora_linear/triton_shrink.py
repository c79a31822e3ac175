# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton concatenates tuples, it does not unpack them.
"""Shrink: S = drop(X) A^T for every member of a group, in one pass over X.

Math       S_g[m, r] = ks * sum_k keep_g[m, k] X[m, k] A_g[r, k]        ks = 1 / P(keep)
Shapes     X [M, K], A_g [r_g, K] in any strides; S [M, sum r_g] contiguous, or partial sums
           [SPLIT, M, sum r_g] in fp32 (PARTIAL) that sum_partials adds and scales.
Grid       (ceil(M / BM), SPLIT): a program owns BM rows of S and one of SPLIT ranges of K, and
           holds all members' sums, [G][BM, RP], in registers.
Bytes      X once (2 M K for bf16), A once per row block from L2, S once; with SPLIT > 1 also
           8 SPLIT M sum(r) for the partial sums. Flops 2 M K sum(RP). Bound by X: 22 us for
           M = 8192, K = 4096 at 3 TB/s; dropout adds about 7 integer operations per element.
Numerics   fp32 accumulation; A is rounded to the dtype of X as a multiplicand. S is rounded once.
           Bitwise reproducible: the order of every sum is fixed by the shapes.
Limits     G * RP <= 256 by registers (configs.py); rank is padded to RP with zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.ops._triton_philox import keep_tile


@triton.jit
def _a_tile(a, k, rank, K, sar, sak, RP: tl.constexpr, dtype: tl.constexpr):
    """A^T tile [len(k), RP] in the dtype of X; zero past the rank and past K."""
    r = tl.arange(0, RP)
    inside = (k[:, None] < K) & (r[None, :] < rank)
    tile = tl.load(a + k.to(tl.int64)[:, None] * sak + r[None, :] * sar, mask=inside, other=0.0)
    return tile.to(tl.float32).to(dtype) if tile.dtype != dtype else tile


@triton.jit(do_not_specialize=["M", "threshold", "keep_scale", "blocks_per_split"])
def shrink(
    x, a_ptrs, s, seed_ptr, M, K, total_rank, first_column, ranks, sxm, sxk, sars, saks,
    keep_scale, threshold, blocks_per_split, stream,
    G: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PARTIAL: tl.constexpr,
    EVEN_K: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    x_rows = x + tl.where(rows < M, rows, 0).to(tl.int64)[:, None] * sxm
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(K, BK))
    dtype = x.dtype.element_ty
    sums = ()
    for _ in tl.static_range(G):
        sums = sums + (tl.zeros((BM, RP), tl.float32),)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for block in tl.range(first, last):
        k = block * BK + tl.arange(0, BK)
        pointers = x_rows + k.to(tl.int64)[None, :] * sxk
        if EVEN_K:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(k < K)[None, :], other=0.0)
        added = ()
        for g in tl.static_range(G):
            a = _a_tile(a_ptrs[g], k, ranks[g], K, sars[g], saks[g], RP, dtype)
            kept = tile
            if DROPOUT:
                keep = keep_tile(seed, rows, block * BK, stream + g, threshold, BM, BK)
                kept = tl.where(keep, tile, 0.0)
            added = added + (tl.dot(kept, a, sums[g], input_precision=PRECISION),)
        sums = added
    s += split.to(tl.int64) * M * total_rank
    column = first_column
    for g in tl.static_range(G):
        r = tl.arange(0, RP)
        out = s + rows.to(tl.int64)[:, None] * total_rank + (column + r)[None, :]
        value = sums[g] if PARTIAL else (sums[g] * keep_scale).to(s.dtype.element_ty)
        tl.store(out, value, mask=(rows < M)[:, None] & (r < ranks[g])[None, :])
        column += ranks[g]
