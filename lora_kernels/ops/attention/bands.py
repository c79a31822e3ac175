"""A dense problem in bands: some queries, all the keys that any of them sees, torch's SDPA kernel.

Keys that causal or the window exclude are left out of a band's call, those at its edges are hidden
by a mask of the band alone. A query is in one band only, so the forward has nothing to merge;
gradients of keys and values are summed over the bands in one order, in fp32 (fp64 for fp64).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels.ops.attention import blocked, sdpa
from lora_kernels.ops.attention.operands import Operands, sink_gradient

_ROWS = 128  # of a band: short enough to leave keys out, long enough for the kernel's own blocks


def _bands(d: Operands) -> Iterator[tuple[slice, slice, Operands]]:
    """Rows, the keys that they see, and their problem; a band that sees none is left out."""
    rows, keys = d.q.shape[1], d.k.shape[1]
    left, right = d.window
    for i0 in range(0, rows, _ROWS):
        i1 = min(i0 + _ROWS, rows)
        low = 0 if left < 0 else max(0, i0 + keys - rows - left)
        high = keys if right < 0 else min(keys, i1 + keys - rows + right)
        if high <= low:
            continue
        band, seen = slice(i0, i1), slice(low, high)
        part = replace(
            d, q=d.q[:, band], k=d.k[:, seen], v=d.v[:, seen], window=(-1, -1),
            mask=_mask(blocked.Block(d, (i0, i1), (low, high))),
        )  # fmt: skip
        yield band, seen, part


def _mask(block: blocked.Block) -> Tensor | None:
    """The band's share of the caller's mask, and what the window hides."""
    hidden, mask = block.hidden(), block.d.mask
    part = None if mask is None else block.of_mask(mask)
    if hidden is None:
        return part
    if part is None:
        return ~hidden[None, None]
    if part.dtype == torch.bool:
        return part & ~hidden
    return part.masked_fill(hidden, -torch.inf)


def forward(d: Operands) -> tuple[Tensor, Tensor]:
    """out [B, S, H, D], lse [B, H, S]."""
    batch, rows, heads, _ = d.q.shape
    out = d.q.new_zeros(batch, rows, heads, d.v.shape[3])
    lse = d.q.new_full((batch, heads, rows), -torch.inf, dtype=d.wide)
    if d.sinks is not None:
        lse[:] = d.sinks.to(d.wide)[:, None]
    for band, _, part in _bands(d):
        out[:, band], lse[:, :, band] = sdpa.forward(part)
    return out, lse


def backward(
    dout: Tensor, d: Operands, out: Tensor, lse: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of q, k, v and sinks."""
    dq = torch.zeros_like(d.q)
    dk, dv = (torch.zeros_like(t, dtype=d.wide) for t in (d.k, d.v))
    dsinks = None
    for band, seen, part in _bands(d):
        one_dq, one_dk, one_dv, one_dsinks = sdpa.backward(
            dout[:, band], part, out[:, band], lse[:, :, band], needs
        )
        for total, where, one in ((dk, seen, one_dk), (dv, seen, one_dv)):
            if one is not None:
                total[:, where] += one
        if one_dq is not None:
            dq[:, band] = one_dq
        if one_dsinks is not None:
            dsinks = one_dsinks if dsinks is None else dsinks + one_dsinks
    if dsinks is None and needs[3] and d.sinks is not None:
        dsinks = sink_gradient(d.sinks, lse, torch.zeros_like(lse))
    return [dq, dk.to(d.k.dtype), dv.to(d.v.dtype), dsinks]
