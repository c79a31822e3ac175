"""rope over library calls: the second term is added to each channel of a pair in place, without a
turned copy of the heads, and on the CPU for as many positions at a time as stay in its cache.
Formulas: reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ELEMENTS = 1 << 17  # of a chunk: two fp32 copies of it fit the second-level cache


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
    c, s = (
        (t if position_ids is None else t[position_ids]).to(wide).unsqueeze(-2) for t in (cos, sin)
    )
    outs = []
    for x in heads:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        step = x.shape[-3] if x.is_cuda else _ELEMENTS // max(1, x[..., :1, :, :rotated].numel())
        for some in _chunks(x.shape[-3], max(1, step)):
            part = x[..., some, :, :rotated].to(wide)
            x1, x2 = _pairs(part, rotated, interleaved)
            s1, s2 = _pairs(s[..., some, :, :], rotated, interleaved)
            y = part * c[..., some, :, :]
            y1, y2 = _pairs(y, rotated, interleaved)
            if inverse:
                y1.addcmul_(x2, s2)
                y2.addcmul_(x1, s1, value=-1.0)
            else:
                y1.addcmul_(x2, s1, value=-1.0)
                y2.addcmul_(x1, s2)
            out[..., some, :, :rotated] = y
        out[..., rotated:] = x[..., rotated:]
        outs.append(out)
    return outs


def _chunks(positions: int, step: int) -> Iterator[slice]:
    for begin in range(0, positions, step):
        yield slice(begin, begin + step)


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
