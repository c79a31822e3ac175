"""Row norms of the adapted weight V = W + s B A, without forming V or B A.

    |V_i|^2 = |W_i|^2 + 2 s <B_i, (W A^T)_i> + s^2 <B_i, B_i (A A^T)>

costs one thin product over W. Where the update nearly cancels a row of W the sum loses its digits;
on the CPU such rows, and those alone, are formed and summed directly. On a GPU picking rows would
wait for the device, so there V is formed and summed in blocks of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

# W is converted by blocks of rows that stay in cache; a GPU takes larger ones.
_ROWS, _GPU_ROWS = 1024, 8192
# A sum below this part of its terms has lost too many digits.
_CANCELLED = 1.0 / 16.0


@torch.no_grad()
def row_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """|W + scaling B A| by rows, [N]; fp32, or fp64 where an operand is.

    Args:
        weight: ``[N, K]``; lora_a ``[r, K]``; lora_b ``[N, r]``; any floating dtypes.
    """
    dtype = torch.promote_types(
        torch.promote_types(weight.dtype, torch.promote_types(lora_a.dtype, lora_b.dtype)),
        torch.float32,
    )
    a, b = lora_a.to(dtype), lora_b.to(dtype) * scaling
    norm = weight.new_empty(weight.shape[0], dtype=dtype)
    if weight.is_cuda:
        for i in range(0, len(weight), _GPU_ROWS):
            rows = slice(i, i + _GPU_ROWS)
            norm[rows] = _direct(weight[rows], a, b[rows])
        return norm
    gram = a @ a.t()
    for i in range(0, len(weight), _ROWS):
        rows = slice(i, i + _ROWS)
        norm[rows] = _expanded(weight[rows], a, b[rows], gram)
    return norm


def _direct(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(torch.addmm(weight.to(a.dtype), b, a), dim=1)


def _expanded(weight: Tensor, a: Tensor, b: Tensor, gram: Tensor) -> Tensor:
    w = weight.to(a.dtype)
    of_w, of_update = w.square().sum(1), ((b @ gram) * b).sum(1)
    square = of_w + 2.0 * ((w @ a.t()) * b).sum(1) + of_update
    cancelled = square < _CANCELLED * (of_w + of_update)
    norm = square.clamp_min(0.0).sqrt()
    if cancelled.any():
        rows = cancelled.nonzero()[:, 0]
        norm[rows] = _direct(w[rows], a, b[rows])
    return norm
