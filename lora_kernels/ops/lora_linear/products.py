"""Products of the adapter over library GEMMs, with few launches and no large temporaries."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops._philox_jit import drop

# Rows converted at a time when dA or dB is accumulated in fp32 from a low-precision operand on
# the CPU: the fp32 copy of the chunk stays in cache.
_CHUNK = 512
# Elements of dS A that are masked at a time, so that no second [M, K] tensor appears.
_MASKED_CHUNK = 1 << 23
_split_copy = torch.ops.aten.split_with_sizes_copy.default


def on_gpu(t: Tensor) -> bool:
    """Every operator is a launch there; on the CPU the plain product sums more exactly."""
    return t.is_cuda


def scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale * left right, in `out` where given; what `out` holds before does not count."""
    if on_gpu(left):
        out = left.new_empty(left.shape[0], right.shape[1]) if out is None else out
        return out.addmm_(left, right, beta=0, alpha=scale)
    if out is not None:
        return torch.mul(left @ right, scale, out=out)
    product = left @ right
    return product if scale == 1.0 else product.mul_(scale)


def mm_accumulate(left: Tensor, right: Tensor, out_dtype: torch.dtype, scale: float) -> Tensor:
    """scale * left^T right, [M, p]^T [M, q], accumulated in `out_dtype` where it is wider."""
    if out_dtype.itemsize <= left.dtype.itemsize:
        return scaled_product(left.t(), right, scale).to(out_dtype)
    if left.is_cuda and out_dtype == torch.float32:
        product = torch.mm(left.t(), right, out_dtype=torch.float32)
        return product if scale == 1.0 else product.mul_(scale)
    total = left.new_zeros(left.shape[1], right.shape[1], dtype=out_dtype)
    for i in range(0, left.shape[0], _CHUNK):
        rows = slice(i, i + _CHUNK)
        total.addmm_(left[rows].to(out_dtype).t(), right[rows].to(out_dtype), alpha=scale)
    return total


def add_dropped(dx: Tensor, ds: Tensor, a: Tensor, p: float, seed: Tensor, stream: int) -> None:
    """dX += (dS A) * D, some rows at a time."""
    step = max(1, _MASKED_CHUNK // max(dx.shape[1], 1))
    for i in range(0, dx.shape[0], step):
        dx[i : i + step] += drop(ds[i : i + step] @ a, seed, p, stream, i)


def joint_das(
    ds: Tensor, x: Tensor, lora_as: list[Tensor], ranks: list[int], scale: float = 1.0
) -> list[Tensor]:
    """scale * dA of every member from one product, which reads X once. Copied apart: gradients that
    share one storage would keep each other alive."""
    if len({a.dtype for a in lora_as}) > 1:
        parts = ds.split(ranks, 1)
        return [mm_accumulate(d, x, a.dtype, scale) for d, a in zip(parts, lora_as, strict=True)]
    joined = mm_accumulate(ds, x, lora_as[0].dtype, scale)
    return [joined] if len(ranks) == 1 else _split_copy(joined, ranks)
