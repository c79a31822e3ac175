"""lora_linear over library GEMMs: the floor that every own kernel has to beat.

Against eager PEFT it never makes a second [M, N] tensor (the update is accumulated into Y and dX
by `addmm_`), computes S and dS once, reads X once for the shrink and once for dA of a whole group
without dropout, and returns dA and dB from fp32 accumulators when the adapter is fp32.

Launches for a group of G without dropout, adapters in the dtype of x: forward 1 + 2 G (and 1 to
join the A of a group), backward 2 + 3 G (and 2 for a group: join, split). A given S saves its one
(and the join), a given dS saves G. `tests/ops/test_lora_linear_launches.py` holds these counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.ops._philox import keep_scale
from lora_kernels.ops._philox_jit import drop
from lora_kernels.ops.lora_linear.products import (
    add_dropped,
    joint_das,
    mm_accumulate,
    scaled_product,
)


def supports(problem: object) -> tuple[bool, str]:
    return True, "library GEMMs"


def _joined(lora_as: list[Tensor], dtype: torch.dtype) -> Tensor:
    """[sum of ranks, K] in `dtype`."""
    low = [a.to(dtype) for a in lora_as]
    return low[0] if len(low) == 1 else torch.cat(low)


def _shrink(x: Tensor, lora_as: list[Tensor], dropout_p: float, seed: Tensor | None) -> Tensor:
    """S [M, sum of ranks] in the dtype of x."""
    if dropout_p == 0.0 or seed is None:
        return x @ _joined(lora_as, x.dtype).t()
    s = x.new_empty(x.shape[0], sum(a.shape[0] for a in lora_as))
    column = 0
    for g, a in enumerate(lora_as):
        if a.shape[0] == 0:  # no adapter
            continue
        part = s[:, column : column + a.shape[0]]
        dropped = drop(x, seed, dropout_p, g)
        scaled_product(dropped, a.to(x.dtype).t(), keep_scale(dropout_p), part)
        column += a.shape[0]
    return s


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
    """Ys, each [M, N_g], and S [M, sum of ranks] in the dtype of x: `shrunk` where given."""
    s = _shrink(x, lora_as, dropout_p, seed) if shrunk is None else shrunk
    ys, column = [], 0
    for w, b, bias, scaling in zip(weights, lora_bs, biases, scalings, strict=True):
        y = F.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))
        part = s if len(weights) == 1 else s[:, column : column + b.shape[1]]
        if b.shape[1]:
            y.addmm_(part, b.to(x.dtype).t(), alpha=scaling)
        column += b.shape[1]
        ys.append(y)
    return ys, s


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
    ranks = [a.shape[0] for a in lora_as]
    rescale = 1.0 if seed is None else keep_scale(dropout_p)
    single = len(ranks) == 1
    dx, das, dbs, column = x.new_empty(0), [], [], 0
    make_ds = (need_dx or need_da) and ds is None
    if ds is None:
        ds = x if single or not make_ds else x.new_empty(x.shape[0], sum(ranks))
    for g, (dy, w, b, scaling) in enumerate(zip(dys, weights, lora_bs, scalings, strict=True)):
        if make_ds:
            out = None if single else ds[:, column : column + ranks[g]]
            made = scaled_product(dy, b.to(x.dtype), scaling * rescale, out)
            ds = made if single else ds
        if need_dx:
            dx = dy @ w.to(x.dtype) if g == 0 else dx.addmm_(dy, w.to(x.dtype))
        if need_db:
            part = s if single else s[:, column : column + ranks[g]]
            dbs.append(mm_accumulate(dy, part, b.dtype, scaling))
        column += ranks[g]
    if seed is None or dropout_p == 0.0:
        if need_dx:
            dx.addmm_(ds, _joined(lora_as, x.dtype))
        if need_da:
            das = joint_das(ds, x, lora_as, ranks)
        return dx, das, dbs
    column = 0
    for g, a in enumerate(lora_as):
        if need_dx or need_da:
            part = ds[:, column : column + ranks[g]]
        if need_dx and ranks[g]:
            add_dropped(dx, part, a.to(x.dtype), dropout_p, seed, g)
        if need_da and ranks[g] == 0:
            das.append(torch.empty_like(a))
        elif need_da:
            das.append(mm_accumulate(part, drop(x, seed, dropout_p, g), a.dtype, 1.0))
        column += ranks[g]
    return dx, das, dbs
