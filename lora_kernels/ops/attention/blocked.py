"""A dense problem in blocks of queries x keys with an online softmax, in library calls.

Blocks that causal or the window exclude are skipped, edges are masked inside their block, and no
tensor of queries x keys exists: beside one block of scores, memory is the operands in fp32.
The softmax keeps per row its maximum m and sum l; a block rescales both and the output
(Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_kernels.ops import _philox
from lora_kernels.ops.attention.operands import Operands, row_gradient, sink_gradient

# Rows and keys of a block: small enough to skip what a window excludes, large enough for a GEMM.
_ROWS, _LEAST_ROWS, _KEYS = 256, 16, 256
_SCORES = 1 << 22  # elements of a block of scores, all heads of the batch together


class Block:
    """Scores and masks of rows [i0, i1) against keys [j0, j1)."""

    def __init__(self, d: Operands, i: tuple[int, int], j: tuple[int, int]) -> None:
        self.d, self.i, self.j = d, i, j

    def _positions(self) -> tuple[Tensor, Tensor]:
        """Of rows [R, 1] and keys [C]: the last row stands at the last key."""
        device, offset = self.d.q.device, self.d.k.shape[1] - self.d.q.shape[1]
        rows = torch.arange(self.i[0] + offset, self.i[1] + offset, device=device)
        return rows.unsqueeze(1), torch.arange(*self.j, device=device)

    def of_mask(self, mask: Tensor) -> Tensor:
        rows = slice(*self.i) if mask.shape[2] > 1 else slice(None)
        keys = slice(*self.j) if mask.shape[3] > 1 else slice(None)
        return mask[:, :, rows, keys]

    def hidden(self) -> Tensor | None:
        """[R, C], True where the window excludes; None where it excludes nothing here."""
        (left, right), (i0, i1), (j0, j1) = self.d.window, self.i, self.j
        offset = self.d.k.shape[1] - self.d.q.shape[1]
        over_left = left >= 0 and j0 < i1 - 1 + offset - left
        over_right = right >= 0 and j1 - 1 > i0 + offset + right
        if not (over_left or over_right):
            return None
        rows, keys = self._positions()
        hidden = keys > rows + right if over_right else None
        if over_left:
            before = keys < rows - left
            hidden = before if hidden is None else hidden | before
        return hidden

    def scores(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """z [B, H, R, C] of scaled q and k, and dz / d(q k) where there is a softcap."""
        d = self.d
        z = _product(q, k.mT, d)
        cap = None
        if d.softcap != 0.0:
            t = z.div_(d.softcap).tanh_()
            cap = t.square().neg_().add_(1.0)
            z = t.mul_(d.softcap)
        if d.slopes is not None:
            rows, keys = self._positions()
            distance = (rows - keys).abs().to(d.wide)
            z -= d.slopes.to(d.wide)[:, :, None, None] * distance
        if d.mask is not None:
            part = self.of_mask(d.mask)
            if part.dtype == torch.bool:
                z.masked_fill_(~part, -torch.inf)
            else:
                z += part.to(d.wide)
        hidden = self.hidden()
        if hidden is not None:
            z.masked_fill_(hidden, -torch.inf)
        return z, cap

    def kept(self) -> Tensor:
        """[B, H, R, C], False where dropout drops: the counter of _philox.keep_mask with row i,
        column j and stream b H + h."""
        d, seed = self.d, self.d.seed
        assert seed is not None
        device = d.q.device
        seed = seed.to(device).reshape(())
        batch, _, heads, _ = d.q.shape
        first, last = self.j[0] // 128, -(-self.j[1] // 128)
        lane = torch.arange(16 * first, 16 * last, device=device)
        row = torch.arange(*self.i, device=device)[:, None]
        stream = torch.arange(batch * heads, device=device)[:, None, None] + d.first_stream
        zero = torch.zeros((), dtype=torch.int64, device=device)
        key = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
        words = _philox.philox4x32(key, (lane, row, stream, zero))
        least = _philox.threshold(d.dropout_p)
        # [streams, R, blocks of 128, word, lane, half]
        pairs = [torch.stack([(w & 0xFFFF) >= least, (w >> 16) >= least], -1) for w in words]
        split = [p.unflatten(2, (last - first, 16)) for p in pairs]
        kept = torch.stack(split, 3).flatten(2)
        inside = kept[:, :, self.j[0] - 128 * first : self.j[1] - 128 * first]
        return inside.unflatten(0, (batch, heads))


def _product(a: Tensor, b: Tensor, d: Operands) -> Tensor:
    """a [B, H, R, *] times b [B, Hk, *, *]: the heads of a group share b, so they are its rows."""
    batch, heads, rows, inner = a.shape
    groups = d.k.shape[2]
    folded = a.reshape(batch, groups, heads // groups * rows, inner)
    return (folded @ b).view(batch, heads, rows, b.shape[-1])


def _group_sum(a: Tensor, b: Tensor, d: Operands) -> Tensor:
    """sum over rows and heads of a group of a^T b, [B, Hk, *, *]."""
    groups = d.k.shape[2]

    def folded(t: Tensor) -> Tensor:
        batch, heads, rows, inner = t.shape
        return t.reshape(batch, groups, heads // groups * rows, inner)

    return folded(a).mT @ folded(b)


def _blocks(d: Operands) -> Iterator[tuple[tuple[int, int], list[Block]]]:
    """Rows, and the blocks of keys that any of them sees."""
    batch, rows, heads, _ = d.q.shape
    keys = d.k.shape[1]
    left, right = d.window
    fits = _SCORES // max(1, batch * heads * min(_KEYS, max(keys, 1)))
    step = max(_LEAST_ROWS, min(_ROWS, fits))
    for i0 in range(0, rows, step):
        i = (i0, min(i0 + step, rows))
        low = 0 if left < 0 else max(0, i0 + keys - rows - left)
        high = keys if right < 0 else min(keys, i[1] + keys - rows + right)
        spans = [(j, min(j + _KEYS, high)) for j in range(low, high, _KEYS)]
        yield i, [Block(d, i, span) for span in spans]


def _heads_first(t: Tensor, wide: torch.dtype) -> Tensor:
    return t.transpose(1, 2).to(wide).contiguous()


def forward(d: Operands) -> tuple[Tensor, Tensor]:
    """out [B, S, H, Dv], lse [B, H, S]."""
    batch, rows, heads, _ = d.q.shape
    k, v = _heads_first(d.k, d.wide), _heads_first(d.v, d.wide)
    out = d.q.new_empty(batch, rows, heads, d.v.shape[3])
    lse = d.q.new_empty(batch, heads, rows, dtype=d.wide)
    for i, blocks in _blocks(d):
        q = _heads_first(d.q[:, slice(*i)], d.wide) * d.scale
        m = q.new_full((batch, heads, q.shape[2], 1), -torch.inf)
        if d.sinks is not None:
            m = d.sinks.to(d.wide).view(1, -1, 1, 1).expand(m.shape)
        total = (m > -torch.inf).to(d.wide)
        acc = q.new_zeros(batch, heads, q.shape[2], v.shape[3])
        for block in blocks:
            keys = slice(*block.j)
            z, _ = block.scores(q, k[:, :, keys])
            top = torch.maximum(m, z.amax(-1, keepdim=True))
            base = top.masked_fill(top == -torch.inf, 0.0)
            fade = torch.exp(m - base)
            p = z.sub_(base).exp_()
            total = total * fade + p.sum(-1, keepdim=True)
            if d.dropout_p != 0.0:
                p = p.masked_fill_(~block.kept(), 0.0)
            acc = acc.mul_(fade).add_(_product(p, v[:, :, keys], d))
            m = top
        if d.dropout_p != 0.0:
            acc *= _philox.keep_scale(d.dropout_p)
        acc /= total.masked_fill(total == 0.0, 1.0)
        out[:, slice(*i)] = acc.transpose(1, 2)
        lse[:, :, slice(*i)] = (m + total.log()).squeeze(-1)
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, d: Operands, out: Tensor, lse: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of q, k, v, sinks and mask; each sum runs over the blocks in one order."""
    k, v = _heads_first(d.k, d.wide), _heads_first(d.v, d.wide)
    delta = row_gradient(dout, out, dlse, d.wide)
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    dq, dk, dv = torch.empty_like(d.q), torch.zeros_like(k), torch.zeros_like(v)
    dmask = None
    if needs[4] and d.mask is not None:
        dmask = d.mask.new_zeros(d.mask.shape, dtype=d.wide)
    for i, blocks in _blocks(d):
        rows = slice(*i)
        q = _heads_first(d.q[:, rows], d.wide) * d.scale
        do = _heads_first(dout[:, rows], d.wide)
        less = delta[:, :, rows].unsqueeze(-1)
        dq_rows = torch.zeros_like(q)
        for block in blocks:
            keys = slice(*block.j)
            z, cap = block.scores(q, k[:, :, keys])
            p = z.sub_(safe[:, :, rows].unsqueeze(-1)).exp_()
            dp = _product(do, v[:, :, keys].mT, d)
            weight = p
            if d.dropout_p != 0.0:
                scaled = block.kept().to(d.wide) * _philox.keep_scale(d.dropout_p)
                weight, dp = p * scaled, dp.mul_(scaled)
            dv[:, :, keys] += _group_sum(weight, do, d)
            dz = dp.sub_(less).mul_(p)
            if dmask is not None:
                part = block.of_mask(dmask)
                part += dz.sum_to_size(part.shape)
            if cap is not None:
                dz.mul_(cap)
            dq_rows += _product(dz, k[:, :, keys], d)
            dk[:, :, keys] += _group_sum(dz, q, d)
        dq[:, rows] = dq_rows.mul_(d.scale).transpose(1, 2)
    dsinks = None
    if needs[3] and d.sinks is not None:
        dsinks = sink_gradient(d.sinks, lse, delta)
    return [dq, dk.transpose(1, 2).to(d.k.dtype), dv.transpose(1, 2).to(d.v.dtype), dsinks, dmask]
