"""Oracle of rope: the formulas, in plain PyTorch.

Of a head x [D] at position n, the first R channels are rotated and the others pass through:

    y = x cos_n + turn(x) sin_n
    half-rotated: turn(x) = (-x_[R/2:], x_[:R/2])           channel i goes with i + R / 2
    interleaved:  turn(x) = (-x_1, x_0, -x_3, x_2, ...)     channel 2 i goes with 2 i + 1
    dx = dy cos_n + turn^T(dy sin_n),   turn^T = -turn

With cos and sin equal on the two channels of a pair, as they are made, dx is dy rotated back.
Computed in fp32 (fp64 for fp64) and rounded once. Source: Su et al. 2021, arXiv 2104.09864;
the half-rotated pairing is that of GPT-NeoX and Llama in transformers, the other that of GPT-J.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _turn(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _at_positions(table: Tensor, position_ids: Tensor | None, wide: torch.dtype) -> Tensor:
    """[..., S, 1, R]: one row for all heads."""
    if position_ids is not None:
        table = table[position_ids.long()]
    return table.to(wide).unsqueeze(-2)


def _rotate(
    heads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, inverse: bool,
) -> list[Tensor]:  # fmt: skip
    wide = torch.float64 if heads[0].dtype == torch.float64 else torch.float32
    c, s = (_at_positions(t, position_ids, wide) for t in (cos, sin))
    outs = []
    for x in heads:
        part, rest = x[..., : cos.shape[-1]].to(wide), x[..., cos.shape[-1] :]
        if inverse:
            y = part * c - _turn(part * s, interleaved)
        else:
            y = part * c + _turn(part, interleaved) * s
        outs.append(torch.cat([y.to(x.dtype), rest], -1))
    return outs


def rope_fwd(
    heads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> list[Tensor]:
    """Every tensor of heads [..., S, H, D] rotated."""
    return _rotate(heads, cos, sin, position_ids, interleaved, False)


def rope_bwd(
    grads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> list[Tensor]:
    """Gradients of heads from those of the results."""
    return _rotate(grads, cos, sin, position_ids, interleaved, True)
