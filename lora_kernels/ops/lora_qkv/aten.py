"""lora_qkv as a call of lora_linear and one of rope, in place of the heads that it has written.

What runs inside is chosen there: on the CPU the compiled kernels, so that q and k are turned by the
threads that wrote them, while they are in the cache, and no second tensor is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops.rope import rotate_in_place


def lora_qkv_fwd(
    x: Tensor, weights: list[Tensor], lora_as: list[Tensor], lora_bs: list[Tensor],
    biases: list[Tensor | None], scalings: list[float], dropout_p: float, seed: Tensor | None,
    cos: Tensor, sin: Tensor, position_ids: Tensor | None, sequence: int, head_dim: int,
    rotated: list[int], interleaved: bool, inner: str,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Members [M, N_g], the first `rotated` heads of each rotated, and S [M, sum of ranks]."""
    ys, s = torch.ops.lora_kernels.lora_linear_fwd.default(
        x, weights, lora_as, lora_bs, biases, scalings, dropout_p, seed, inner
    )
    heads = [
        y[:, : n * head_dim].unflatten(1, (n, head_dim)).unflatten(0, (-1, sequence))
        for y, n in zip(ys, rotated, strict=True)
        if n
    ]
    if not heads:
        return ys, s
    turned = iter(rotate_in_place(heads, cos, sin, position_ids, interleaved, inner))
    return [_placed(y, next(turned)) if n else y for y, n in zip(ys, rotated, strict=True)], s


def _placed(y: Tensor, turned: Tensor) -> Tensor:
    """y [M, N] with its first heads turned, which were turned in place, or are a tensor apart."""
    rows = turned.flatten(0, 1).flatten(1)
    if rows.data_ptr() == y.data_ptr():
        return y
    if rows.shape == y.shape:
        return rows
    y[:, : rows.shape[1]] = rows
    return y
