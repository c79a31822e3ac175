"""rms_norm over library calls: PyTorch's fused kernel on a GPU where it computes this very formula,
element-wise calls in fp32 otherwise.

On the CPU the rows go in pieces, so that no fp32 temporary leaves the cache; their size is fixed,
so dweight does not depend on the number of threads. Formulas: reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ELEMENTS = 1 << 17  # of a piece on the CPU


def _pieces(t: Tensor) -> Iterator[slice]:
    """Slices of the rows of t [M, K]."""
    rows = t.shape[0]
    step = rows if t.device.type != "cpu" else max(1, _ELEMENTS // t.shape[1])
    for begin in range(0, rows, step):
        yield slice(begin, begin + step)


def _wide(t: Tensor, x: Tensor) -> Tensor:
    return t.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _gain(weight: Tensor | None, offset: float, x: Tensor) -> Tensor | None:
    if weight is None:
        return None
    return _wide(weight, x) if offset == 0.0 else _wide(weight, x) + offset


def _in_library(x: Tensor, weight: Tensor | None, offset: float) -> bool:
    """PyTorch's fused kernel exists for x and multiplies by the weight as it is."""
    plain = weight is None or (offset == 0.0 and weight.dtype == x.dtype)
    return x.device.type == "cuda" and plain


def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, lora_as: list[Tensor], eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Y [M, K] in the dtype of x, rstd [M] in fp32 (fp64), S [M, sum of ranks] in that of x."""
    if _in_library(x, weight, offset):
        y, rstd = torch.ops.aten._fused_rms_norm(x.contiguous(), [x.shape[1]], weight, eps)
        rstd = rstd.reshape(x.shape[0])
    else:
        y, rstd = _normalize(x, _gain(weight, offset, x), eps)
    if not lora_as:
        return y, rstd, x.new_empty(x.shape[0], 0)
    low = [a.to(x.dtype) for a in lora_as]
    return y, rstd, y @ (low[0] if len(low) == 1 else torch.cat(low)).t()


def _normalize(x: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    wide_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rstd = torch.empty(x.shape[0], 1, dtype=wide_dtype, device=x.device)
    for rows in _pieces(x):
        wide = x[rows].to(wide_dtype)
        some = torch.rsqrt(wide.square().mean(1, keepdim=True).add_(eps))
        rstd[rows] = some
        if gain is None:
            y[rows] = wide * some
        elif x.dtype == wide_dtype:
            torch.mul(wide * some, gain, out=y[rows])
        else:
            y[rows] = (wide * some).mul_(gain)
    return y, rstd[:, 0]


def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, need_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """dX [M, K] in the dtype of x; dW [K] in that of weight, None where it is not needed."""
    need_dweight = need_dweight and weight is not None
    if _in_library(x, weight, offset):
        dx, dweight = torch.ops.aten._fused_rms_norm_backward(
            dy.contiguous(), x.contiguous(), [x.shape[1]], rstd[:, None], weight,
            [True, need_dweight],
        )  # fmt: skip
        return dx, dweight if need_dweight else None
    gain = _gain(weight, offset, x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = rstd.new_zeros(x.shape[1]) if need_dweight else None
    for rows in _pieces(x):
        some = rstd[rows, None]
        normalized = _wide(x[rows], x) * some
        wide_dy = _wide(dy[rows], x)
        g = wide_dy if gain is None else wide_dy * gain
        mean = (g * normalized).mean(1, keepdim=True)
        if total is not None:
            total += (wide_dy * normalized).sum(0)
        dx[rows] = torch.sub(g, normalized.mul_(mean)).mul_(some)
    return dx, None if total is None or weight is None else total.to(weight.dtype)
