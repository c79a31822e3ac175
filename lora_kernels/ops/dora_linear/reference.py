"""Oracle of dora_linear: the formulas, in plain PyTorch, in whatever dtype the inputs have.

With X [M, K], W [N, K], A [r, K], B [N, r], magnitude m [N], keep mask k / P(keep) = D(p), scale s:

    V  = W + s B A             n = |V| by rows      c = m / n           [N]
    Xd = X * D                 P = Xd V^T                               [M, N]
    Y  = (X - Xd) W^T + c P + bias

which is c (X V^T) + bias without dropout. n counts as a constant for the gradient (PEFT's
convention, section 4.3 of the source), so with dP = c dY:

    dm = sum_rows(dY * P) / n            dS = s dP B
    dA = dS^T Xd                         dB = s dP^T (Xd A^T)
    dX = dY W + (dP W + dS A - dY W) * D dW = dP^T Xd + dY^T (X - Xd)

A row of V that is zero has no direction: there n is taken as 1.
Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024 (arXiv 2402.09353).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops._philox import drop, keep_scale


def _dropped(t: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    if dropout_p == 0.0 or seed is None:
        return t
    return drop(t, seed, dropout_p) * keep_scale(dropout_p)


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
    w, a, b = (t.to(x.dtype) for t in (weight, lora_a, lora_b))
    v = w + scaling * (b @ a)
    norm = torch.linalg.vector_norm(v, dim=1)
    norm = norm.masked_fill(norm == 0, 1.0)
    kept = _dropped(x, dropout_p, seed)
    p = kept @ v.t()
    y = (x - kept) @ w.t() + p * (magnitude.to(x.dtype) / norm)
    if bias is not None:
        y = y + bias.to(x.dtype)
    return y, p if keep else x.new_empty(0), kept @ a.t(), norm


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
    w, a, b = (t.to(x.dtype) for t in (weight, lora_a, lora_b))
    nothing = x.new_empty(0)
    kept = _dropped(x, dropout_p, seed)
    dp = dy * (magnitude.to(x.dtype) / norm.to(x.dtype))
    ds = scaling * (dp @ b)
    dyw = dy @ w
    return (
        dyw + _dropped(dp @ w + ds @ a - dyw, dropout_p, seed) if need_dx else nothing,
        (dp.t() @ kept + dy.t() @ (x - kept)).to(weight.dtype) if need_dw else nothing,
        (ds.t() @ kept).to(lora_a.dtype) if need_da else nothing,
        (scaling * (dp.t() @ s)).to(lora_b.dtype) if need_db else nothing,
        ((dy * p).sum(0) / norm).to(magnitude.dtype) if need_dm else nothing,
    )
