"""lora_linear over library GEMMs: the floor that every own kernel has to beat.

Against eager PEFT it never makes a second [M, N] tensor (the update is accumulated into Y and dX
by `addmm_`), computes S and dS once, reads X once for the shrink of a whole group without
dropout, and returns dA and dB from fp32 accumulators when the adapter is fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.ops._philox import drop, keep_scale

# Rows converted at a time when dA or dB is accumulated in fp32 from a low-precision operand on
# the CPU: the fp32 copy of the chunk stays in cache.
_CHUNK = 512


def supports(problem: object) -> tuple[bool, str]:
    return True, "library GEMMs"


def lora_linear_fwd(
    x: Tensor,
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    biases: list[Tensor | None],
    scalings: list[float],
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Ys, each [M, N_g], and S [M, sum of ranks] in the dtype of x."""
    low = [a.to(x.dtype) for a in lora_as]
    if dropout_p == 0.0 or seed is None:
        s = x @ (low[0] if len(low) == 1 else torch.cat(low)).t()
    else:
        parts = [drop(x, seed, dropout_p, g) @ a.t() for g, a in enumerate(low)]
        s = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).mul_(keep_scale(dropout_p))
    ys, column = [], 0
    for w, a, b, bias, scaling in zip(weights, low, lora_bs, biases, scalings, strict=True):
        y = F.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y.addmm_(s[:, column : column + a.shape[0]], b.to(x.dtype).t(), alpha=scaling)
        column += a.shape[0]
        ys.append(y)
    return ys, s


def _mm_accumulate(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """left^T right, [M, p]^T [M, q], accumulated and returned in `out_dtype` where it is wider."""
    if out_dtype == left.dtype or out_dtype.itemsize <= left.dtype.itemsize:
        return (left.t() @ right).to(out_dtype)
    if left.is_cuda and out_dtype == torch.float32:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    total = left.new_zeros(left.shape[1], right.shape[1], dtype=out_dtype)
    for i in range(0, left.shape[0], _CHUNK):
        total.addmm_(left[i : i + _CHUNK].to(out_dtype).t(), right[i : i + _CHUNK].to(out_dtype))
    return total


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
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dX [M, K], dAs in the dtype of A, dBs in the dtype of B; what is not needed is empty."""
    dx = x.new_empty(0)
    das, dbs, column = [], [], 0
    rescale = 1.0 if seed is None else keep_scale(dropout_p)
    for g, (dy, w, a, b, scaling) in enumerate(
        zip(dys, weights, lora_as, lora_bs, scalings, strict=True)
    ):
        r = a.shape[0]
        s_g, column = s[:, column : column + r], column + r
        if need_dx or need_da:
            ds = (dy @ b.to(x.dtype)).mul_(scaling * rescale)
        if need_dx:
            dx = dy @ w.to(x.dtype) if g == 0 else dx.addmm_(dy, w.to(x.dtype))
            if seed is not None and dropout_p > 0.0:
                dx += drop(ds @ a.to(x.dtype), seed, dropout_p, g)
            else:
                dx.addmm_(ds, a.to(x.dtype))
        if need_da:
            xd = x if seed is None or dropout_p == 0.0 else drop(x, seed, dropout_p, g)
            das.append(_mm_accumulate(ds, xd, a.dtype))
        if need_db:
            dbs.append(_mm_accumulate(dy, s_g, b.dtype).mul_(scaling))
    return dx, das, dbs
