"""Oracle of lora_qkv: the formulas, in plain PyTorch.

Of x [M, K], M = sequences * S, and every member g with W_g [N_g, K], A_g [r_g, K], B_g [N_g, r_g]:

    Y_g = x W_g^T + bias_g + scaling_g x A_g^T B_g^T
    of its heads [M, N_g / D, D] the first h_g are rotated, the first R channels of each:
    Z = Y cos_n + turn(Y) sin_n        n the position of the row; turn as in rope's reference
    dY = dZ cos_n - turn(dZ sin_n)     and with it the gradients of lora_linear

The reference rounds Y to the dtype of x before the rotation, as separate calls do. Source:
Hu et al. 2021, arXiv 2106.09685; Su et al. 2021, arXiv 2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops._philox import drop, keep_scale


def _turn(y: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack([-y[..., 1::2], y[..., 0::2]], -1).flatten(-2)
    first, second = y.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rotate(
    y: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, sequence: int,
    head_dim: int, interleaved: bool,
) -> Tensor:  # fmt: skip
    """y [M, N] rotated by heads."""
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    c, s = (t if position_ids is None else t[position_ids.long()] for t in (cos, sin))
    c, s = (t.to(wide).unsqueeze(-2) for t in (c, s))
    heads = y.reshape(-1, sequence, y.shape[1] // head_dim, head_dim)
    part, rest = heads[..., : cos.shape[-1]].to(wide), heads[..., cos.shape[-1] :]
    turned = part * c + _turn(part, interleaved) * s
    return torch.cat([turned.to(y.dtype), rest], -1).reshape(y.shape)


def lora_qkv_fwd(
    x: Tensor, weights: list[Tensor], lora_as: list[Tensor], lora_bs: list[Tensor],
    biases: list[Tensor | None], scalings: list[float], dropout_p: float, seed: Tensor | None,
    cos: Tensor, sin: Tensor, position_ids: Tensor | None, sequence: int, head_dim: int,
    rotated: list[int], interleaved: bool, inner: str,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Members [M, N_g], the first `rotated` heads of each rotated, and S [M, sum of ranks]."""
    ys, ss = [], []
    for g, (w, a, b, bias) in enumerate(zip(weights, lora_as, lora_bs, biases, strict=True)):
        dropped = x
        if seed is not None and dropout_p > 0.0:
            dropped = drop(x, seed, dropout_p, g) * keep_scale(dropout_p)
        s = dropped @ a.to(x.dtype).t()
        y = x @ w.to(x.dtype).t() + scalings[g] * (s @ b.to(x.dtype).t())
        if bias is not None:
            y = y + bias.to(x.dtype)
        turned, rest = y.tensor_split([rotated[g] * head_dim], 1)
        if rotated[g]:
            turned = rotate(turned, cos, sin, position_ids, sequence, head_dim, interleaved)
        y = torch.cat([turned, rest], 1)
        ys.append(y)
        ss.append(s)
    return ys, torch.cat(ss, 1)
