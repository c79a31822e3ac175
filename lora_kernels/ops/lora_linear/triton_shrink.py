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

from lora_kernels.ops.lora_linear.triton_philox import keep_of_word, words_of_128_columns


@triton.jit
def _a_tile(a, k, rank, K, sar, sak, RP: tl.constexpr, dtype: tl.constexpr):
    """A^T tile [len(k), RP] in the dtype of X; zero past the rank and past K."""
    r = tl.arange(0, RP)
    inside = (k[:, None] < K) & (r[None, :] < rank)
    tile = tl.load(a + k.to(tl.int64)[:, None] * sak + r[None, :] * sar, mask=inside, other=0.0)
    return tile.to(tl.float32).to(dtype) if tile.dtype != dtype else tile


@triton.jit(do_not_specialize=["M", "threshold", "keep_scale", "blocks_per_split"])
def shrink(
    x, a_ptrs, s, seed_ptr, M, K, total_rank, ranks, sxm, sxk, sars, saks,
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
        tl.static_assert(BK == 128)
        seed = tl.load(seed_ptr)
        for block in tl.range(first, last):
            # X arrives in four tiles of 32 columns: one for each word of the generator.
            k0 = block * 128 + tl.arange(0, 32)
            k1, k2, k3 = k0 + 32, k0 + 64, k0 + 96
            x0 = _x_tile(x_rows, k0, K, sxk, EVEN_K)
            x1 = _x_tile(x_rows, k1, K, sxk, EVEN_K)
            x2 = _x_tile(x_rows, k2, K, sxk, EVEN_K)
            x3 = _x_tile(x_rows, k3, K, sxk, EVEN_K)
            added = ()
            for g in tl.static_range(G):
                w0, w1, w2, w3 = words_of_128_columns(seed, rows, block, stream + g)
                t = sums[g]
                a = a_ptrs[g]
                r, sar, sak = ranks[g], sars[g], saks[g]
                t = _add(t, x0, w0, a, k0, r, K, sar, sak, threshold, RP, dtype, PRECISION)
                t = _add(t, x1, w1, a, k1, r, K, sar, sak, threshold, RP, dtype, PRECISION)
                t = _add(t, x2, w2, a, k2, r, K, sar, sak, threshold, RP, dtype, PRECISION)
                t = _add(t, x3, w3, a, k3, r, K, sar, sak, threshold, RP, dtype, PRECISION)
                added = added + (t,)
            sums = added
    else:
        for block in tl.range(first, last):
            k = block * BK + tl.arange(0, BK)
            tile = _x_tile(x_rows, k, K, sxk, EVEN_K)
            added = ()
            for g in tl.static_range(G):
                a = _a_tile(a_ptrs[g], k, ranks[g], K, sars[g], saks[g], RP, dtype)
                added = added + (tl.dot(tile, a, sums[g], input_precision=PRECISION),)
            sums = added
    s += split.to(tl.int64) * M * total_rank
    column = 0
    for g in tl.static_range(G):
        r = tl.arange(0, RP)
        out = s + rows.to(tl.int64)[:, None] * total_rank + (column + r)[None, :]
        value = sums[g] if PARTIAL else (sums[g] * keep_scale).to(s.dtype.element_ty)
        tl.store(out, value, mask=(rows < M)[:, None] & (r < ranks[g])[None, :])
        column += ranks[g]


@triton.jit
def _x_tile(x_rows, k, K, sxk, EVEN_K: tl.constexpr):
    pointers = x_rows + k.to(tl.int64)[None, :] * sxk
    if EVEN_K:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(k < K)[None, :], other=0.0)


@triton.jit
def _add(
    total, x, word, a, k, rank, K, sar, sak, threshold,
    RP: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + drop(x) A^T for the 32 columns of one word."""
    x = tl.where(keep_of_word(word, threshold), x, 0.0)
    tile = _a_tile(a, k, rank, K, sar, sak, RP, dtype)
    return tl.dot(x, tile, total, input_precision=PRECISION)
