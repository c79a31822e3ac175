"""Oracle of lora_linear: the formulas, in plain PyTorch, in whatever dtype the inputs have.

With X [M, K], W [N, K], A [r, K], B [N, r], keep mask D(p) and scale s:

    S  = (X * D / P(keep)) A^T                      [M, r]
    Y  = X W^T + bias + s S B^T                     [M, N]
    dS = s dY B                                     [M, r]
    dX = dY W + (dS A) * D / P(keep)                [M, K]
    dA = dS^T (X * D / P(keep))                     [r, K]
    dB = s dY^T S                                   [N, r]

S and dS may be given instead (without dropout): whoever made X or dY has them.
A group shares X: each member has its own W, A, B, s and its own mask (stream g of the counter).
Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv 2106.09685).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops._philox import drop, keep_scale


def dropped(x: Tensor, dropout_p: float, seed: Tensor | None, stream: int) -> Tensor:
    """X * D / P(keep)."""
    if dropout_p == 0.0 or seed is None:
        return x
    return drop(x, seed, dropout_p, stream) * keep_scale(dropout_p)


def lora_linear_fwd(
    x: Tensor,
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    biases: list[Tensor | None],
    scalings: list[float],
    dropout_p: float,
    seed: Tensor | None,
    shrunk: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Ys, each [M, N_g], and S [M, sum of ranks]: `shrunk` where given."""
    ys, ss, column = [], [], 0
    for g, (w, a, b, bias, scaling) in enumerate(
        zip(weights, lora_as, lora_bs, biases, scalings, strict=True)
    ):
        if shrunk is None:
            s = dropped(x, dropout_p, seed, g) @ a.to(x.dtype).t()
        else:
            s = shrunk[:, column : column + a.shape[0]]
            column += a.shape[0]
        y = x @ w.to(x.dtype).t() + scaling * (s @ b.to(x.dtype).t())
        ys.append(y if bias is None else y + bias.to(x.dtype))
        ss.append(s)
    return ys, torch.cat(ss, 1) if shrunk is None else shrunk


def lora_linear_bwd(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    s: Tensor,
    scalings: list[float],
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    ds: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dX [M, K], dAs in the dtype of A, dBs in the dtype of B; what is not needed is empty."""
    dx = x.new_zeros(x.shape) if need_dx else x.new_empty(0)
    das, dbs, column = [], [], 0
    for g, (dy, w, a, b, scaling) in enumerate(
        zip(dys, weights, lora_as, lora_bs, scalings, strict=True)
    ):
        r = a.shape[0]
        columns, column = slice(column, column + r), column + r
        ds_g = scaling * (dy @ b.to(x.dtype)) if ds is None else ds[:, columns]
        if need_dx:
            dx = dx + dy @ w.to(x.dtype) + dropped(ds_g @ a.to(x.dtype), dropout_p, seed, g)
        if need_da:
            das.append((ds_g.t() @ dropped(x, dropout_p, seed, g)).to(a.dtype))
        if need_db:
            dbs.append((scaling * (dy.t() @ s[:, columns])).to(b.dtype))
    return dx, das, dbs
