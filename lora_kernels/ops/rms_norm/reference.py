"""Oracle of rms_norm: the formulas, in plain PyTorch.

With X [M, K], W [K], g = offset + W (1 without W), A [r, K]:

    rstd = 1 / sqrt(mean_k(X^2) + eps)                              [M]
    N    = X rstd                                                   [M, K]
    Y    = N g                                                      [M, K]
    S    = Y A^T                                                    [M, r]
    dX   = rstd (dY g - N mean_k(dY g N))                           [M, K]
    dW   = sum_m(dY N)                                              [K]

Computed in fp32 (fp64 for fp64); Y, dX and dW are rounded once, S is a product of the rounded Y and
is rounded once. Source: Zhang and Sennrich 2019, arXiv 1910.07467.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(t: Tensor, x: Tensor) -> Tensor:
    return t.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, lora_as: list[Tensor], eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Y [M, K] in the dtype of x, rstd [M] in fp32 (fp64), S [M, sum of ranks] in that of x."""
    wide = _wide(x, x)
    rstd = torch.rsqrt((wide * wide).mean(1) + eps)
    y = wide * rstd[:, None]
    if weight is not None:
        y = y * (_wide(weight, x) + offset)
    y = y.to(x.dtype)
    s = [(_wide(y, x) @ _wide(a.to(x.dtype), x).t()).to(x.dtype) for a in lora_as]
    return y, rstd, torch.cat(s, 1) if s else x.new_empty(x.shape[0], 0)


def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, need_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """dX [M, K] in the dtype of x; dW [K] in that of weight, None where it is not needed."""
    wide_dy, normalized = _wide(dy, x), _wide(x, x) * rstd[:, None]
    g = wide_dy if weight is None else wide_dy * (_wide(weight, x) + offset)
    dx = (g - normalized * (g * normalized).mean(1, keepdim=True)) * rstd[:, None]
    if weight is None or not need_dweight:
        return dx.to(x.dtype), None
    return dx.to(x.dtype), (wide_dy * normalized).sum(0).to(weight.dtype)
