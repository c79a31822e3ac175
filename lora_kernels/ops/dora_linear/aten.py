"""dora_linear around lora_linear: P = Xd W^T + s S B^T is its product, as are dX, dA and dB of dP.

What is added is one pass over P for Y and one over dY for dP and dm, both by blocks of rows in fp32
with one rounding, and the row norms. `inner` names lora_linear's backend: ``aten`` when this one
was asked for by name, ``auto`` otherwise, so that the kernels of lora_linear serve DoRA as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops._philox import drop, keep_scale
from lora_kernels.ops.dora_linear.row_norm import row_norm

# Rows whose fp32 copy stays in cache.
_CHUNK = 256


def _chunks(t: Tensor) -> list[slice]:
    rows = len(t) if t.is_cuda else _CHUNK
    return [slice(i, i + rows) for i in range(0, len(t), max(rows, 1))]


def _dropped(t: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    if dropout_p == 0.0 or seed is None:
        return t
    return drop(t, seed, dropout_p).mul_(keep_scale(dropout_p))


def norm_and_ratio(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """(n, m / n), both [N]; n is 1 where a row of V is zero."""
    norm = row_norm(weight, lora_a, lora_b, scaling)
    norm.masked_fill_(norm == 0, 1.0)
    return norm, magnitude.to(norm.dtype) / norm


def rescale(
    p: Tensor, ratio: Tensor, bias: Tensor | None, rest: Tensor | None, keep: bool
) -> Tensor:
    """ratio P + rest + bias, over P itself unless `keep`."""
    y = torch.empty_like(p) if keep else p
    for rows in _chunks(p):
        part = p[rows] * ratio
        if rest is not None:
            part += rest[rows]
        if bias is not None:
            part += bias
        y[rows] = part
    return y


def through_magnitude(dy: Tensor, p: Tensor | None, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """(dP, sum over the rows of dY P); the sum is zero where P is None."""
    dp = dy.new_empty(dy.shape)
    total = torch.zeros_like(ratio)
    for rows in _chunks(dy):
        dp[rows] = dy[rows] * ratio
        if p is not None:
            total += (dy[rows].to(ratio.dtype) * p[rows].to(ratio.dtype)).sum(0)
    return dp, total


def dora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    keep: bool,
    inner: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Y and P [M, N], S = Xd A^T [M, r], n [N]; P is empty unless `keep`."""
    norm, ratio = norm_and_ratio(weight, lora_a, lora_b, magnitude, scaling)
    kept = _dropped(x, dropout_p, seed)
    weight = weight.to(x.dtype)
    (p,), s = torch.ops.lora_kernels.lora_linear_fwd(
        kept, [weight], [lora_a], [lora_b], [None], [scaling], 0.0, None, inner
    )
    rest = None if kept is x else (x - kept) @ weight.t()
    y = rescale(p, ratio, bias, rest, keep)
    return y, p if keep else x.new_empty(0), s, norm


def dora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    p: Tensor,
    s: Tensor,
    norm: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dw: bool,
    need_da: bool,
    need_db: bool,
    need_dm: bool,
    inner: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dX, dW, dA, dB, dm; what is not needed is empty."""
    nothing = x.new_empty(0)
    ratio = magnitude.to(norm.dtype) / norm
    dp, dm = through_magnitude(dy, p if need_dm else None, ratio)
    kept, low = _dropped(x, dropout_p, seed), weight.to(x.dtype)
    dx, das, dbs = torch.ops.lora_kernels.lora_linear_bwd(
        [dp], kept, [low], [lora_a], [lora_b], s, [scaling], 0.0, None,
        need_dx, need_da, need_db, inner,
    )  # fmt: skip
    if need_dx and kept is not x:
        dyw = dy @ low
        dx = dyw.add_(_dropped(dx.sub_(dyw), dropout_p, seed))
    dw = nothing
    if need_dw:
        dw = dp.t() @ kept
        if kept is not x:
            dw.addmm_(dy.t(), x - kept)
        dw = dw.to(weight.dtype)
    return (
        dx if need_dx else nothing,
        dw,
        das[0] if need_da else nothing,
        dbs[0] if need_db else nothing,
        (dm / norm).to(magnitude.dtype) if need_dm else nothing,
    )
