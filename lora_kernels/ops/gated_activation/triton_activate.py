# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton concatenates tuples, it does not unpack them.
"""The activation, and the shrink of its result while that is in registers.

Math       h = act(g) u (without u: act(g)), rounded to T;  S_j = scale h A_j^T of the rounded h
Shapes     g, u [M, N] and A_j [r_j, N] in any strides; h [M, N] contiguous; S [M, sum r_j]
           contiguous, or partial sums [SPLIT, M, sum r_j] in fp32
Grid       (ceil(M / BM), SPLIT): a program owns BM rows and one of SPLIT ranges of N, and holds
           the sums of all members, [G][BM, RP], in registers. Without members every program has
           one tile. KIND "identity" reads h and stores none: the shrink of members that did not
           fit the first launch, and of gradients.
Bytes      g and u read, h written (6 M N for bf16), A once per row block from L2, S once; with a
           split 8 SPLIT M sum(r) for the partial sums. A pass over h is saved (2 M N).
Numerics   fp32; h rounded once, and the rounded h is the multiplicand, as for who reads h. S sums
           in fp32, rounded once. Bitwise reproducible.
Limits     G * RP <= 256 by registers; ranks are padded to RP with zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

_C = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_A = tl.constexpr(0.044715)
_HALF_ROOT = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def activation(g, KIND: tl.constexpr):
    """act(g) in fp32."""
    if KIND == "silu":
        act = g / (1.0 + tl.exp(-g))
    elif KIND == "gelu":
        act = 0.5 * g * (1.0 + tl.erf(g * _HALF_ROOT))
    elif KIND == "gelu_tanh":
        act = 0.5 * g * (1.0 + _tanh_inside(g))
    elif KIND == "identity":
        act = g
    else:
        positive = tl.where(g < 0.0, 0.0, g)  # NaN stays
        act = positive if KIND == "relu" else positive * positive
    return act


@triton.jit
def _bounded(g):
    """g where tanh of the polynomial is below 1 in fp32; NaN stays."""
    return tl.where(g > 10.0, 10.0, tl.where(g < -10.0, -10.0, g))


@triton.jit
def _tanh_inside(g):
    b = _bounded(g)
    return 1.0 - 2.0 / (tl.exp(2.0 * _C * (b + _A * b * b * b)) + 1.0)


@triton.jit
def activation_and_slope(g, KIND: tl.constexpr):
    """act(g) and act'(g) in fp32."""
    if KIND == "silu":
        s = 1.0 / (1.0 + tl.exp(-g))
        act = g * s
        slope = s * (1.0 + g * (1.0 - s))
    elif KIND == "gelu":
        p = 0.5 * (1.0 + tl.erf(g * _HALF_ROOT))
        act = g * p
        slope = p + g * tl.exp(-0.5 * g * g) * _DENSITY
    elif KIND == "gelu_tanh":
        b, t = _bounded(g), _tanh_inside(g)
        act = 0.5 * g * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * b * (1.0 - t * t) * _C * (1.0 + 3.0 * _A * b * b)
    else:
        positive = tl.where(g < 0.0, 0.0, g)
        if KIND == "relu":
            act = positive
            slope = tl.where(g > 0.0, 1.0, 0.0)
        else:
            act = positive * positive
            slope = 2.0 * positive
    return act, slope


@triton.jit
def as_multiplicand(tile, dtype: tl.constexpr):
    """An adapter's tile in the dtype of what it is multiplied with."""
    return tile.to(tl.float32).to(dtype) if tile.dtype != dtype else tile


@triton.jit(do_not_specialize=["M", "blocks_per_split", "total_rank", "first_column", "scale"])
def activate(
    gate, up, h, a_ptrs, s, M, N, total_rank, first_column, ranks, sgm, sgn, sum_, sun, sars, sans,
    scale, blocks_per_split,
    G: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr,
    GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    there = tl.where(rows < M, rows, 0).to(tl.int64)[:, None]  # a row that exists: no mask
    outside = (rows < M)[:, None]
    gate_rows, up_rows, h_rows = gate + there * sgm, up + there * sum_, h + there * N
    dtype = gate.dtype.element_ty
    r = tl.arange(0, RP)
    sums = ()
    for _ in tl.static_range(G):
        sums = sums + (tl.zeros((BM, RP), tl.float32),)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(N, BN))
    for block in tl.range(first, last):
        n = block * BN + tl.arange(0, BN)
        inside = (n < N)[None, :]
        n64 = n.to(tl.int64)[None, :]
        tile = tl.load(gate_rows + n64 * sgn, mask=inside, other=0.0)
        if KIND != "identity":
            value = activation(tile.to(tl.float32), KIND)
            if GATED:
                value *= tl.load(up_rows + n64 * sun, mask=inside, other=0.0).to(tl.float32)
            tile = value.to(dtype)
            tl.store(h_rows + n64, tile, mask=inside & outside)
        if G > 0:
            # Zero already where masked. Without a select here the compiler computes the activation
            # in the layout of the operand, several times over.
            operand = tl.where(inside, tile, 0.0).to(dtype)
        added = ()
        for j in tl.static_range(G):
            own = a_ptrs[j] + n.to(tl.int64)[:, None] * sans[j] + r[None, :] * sars[j]
            a = tl.load(own, mask=(n < N)[:, None] & (r < ranks[j])[None, :], other=0.0)
            a = as_multiplicand(a, dtype)
            added = added + (tl.dot(operand, a, sums[j], input_precision=PRECISION),)
        sums = added
    out = s + (split.to(tl.int64) * M + rows.to(tl.int64)[:, None]) * total_rank
    column = first_column
    for j in tl.static_range(G):
        value = (sums[j] * scale).to(s.dtype.element_ty)
        tl.store(out + (column + r)[None, :], value, mask=outside & (r < ranks[j])[None, :])
        column += ranks[j]
