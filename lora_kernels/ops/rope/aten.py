"""rope over library calls: each channel of a pair computed into its place in the result, without
a turned copy of the heads. Formulas: reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _pairs(x: Tensor, rotated: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and the second channel of every pair."""
    part = x[..., :rotated]
    if interleaved:
        return part[..., 0::2], part[..., 1::2]
    return part[..., : rotated // 2], part[..., rotated // 2 :]


def _rotate(
    heads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, inverse: bool,
) -> list[Tensor]:  # fmt: skip
    wide = torch.float64 if heads[0].dtype == torch.float64 else torch.float32
    rotated = cos.shape[-1]
    tables = []
    for table in (cos, sin):
        rows = table if position_ids is None else table[position_ids]
        tables.append(_pairs(rows.to(wide).unsqueeze(-2), rotated, interleaved))
    (c1, c2), (s1, s2) = tables
    if inverse:
        s1, s2 = -s2, -s1
    outs = []
    for x in heads:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        x1, x2 = (t.to(wide) for t in _pairs(x, rotated, interleaved))
        y1, y2 = _pairs(out, rotated, interleaved)
        y1.copy_(torch.addcmul(x1 * c1, x2, s1, value=-1.0))
        y2.copy_(torch.addcmul(x2 * c2, x1, s2))
        out[..., rotated:] = x[..., rotated:]
        outs.append(out)
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
