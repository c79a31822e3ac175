"""The form in which library kernels take a problem, and what they return brought into ours.

Kernels of FlashAttention's kind read rows of 16 bytes at 16-byte addresses, so heads are padded
with zeros to a multiple of 8, and for most of them to one size for queries, keys and values: zeros
change no product. Sinks come after the kernel: with t a head's sink, lse' = log(e^lse + e^t), and
O is scaled by e^(lse - lse'). The kernels' backward makes probabilities from the log-sum-exp that
it is given, and its row term from O, so with lse' and the scaled O it is the gradient with sinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.ops.attention.operands import Operands

ROW_BYTES = 16


@dataclass(frozen=True)
class Packing:
    """Where packed sequences begin, int32 on the device, and the longest of them."""

    q: Tensor
    k: Tensor
    max_q: int
    max_k: int


def packing(cu_seqlens: Tensor, cu_seqlens_k: Tensor) -> Packing:
    q = cu_seqlens.to(torch.int32).contiguous()
    k = cu_seqlens_k.to(torch.int32).contiguous()
    max_q, max_k = torch.stack([q.diff().max(), k.diff().max()]).tolist()
    return Packing(q, k, max_q, max_k)


def longest(d: Operands, p: Packing | None) -> tuple[int, int]:
    """Queries and keys of the longest sequence."""
    return (d.q.shape[1], d.k.shape[1]) if p is None else (p.max_q, p.max_k)


def reach(d: Operands, p: Packing | None) -> tuple[int, int]:
    """The window, a side that excludes no key written as -1."""
    (left, right), (rows, keys) = d.window, longest(d, p)
    return -1 if left >= keys - 1 else left, -1 if right >= rows - 1 else right


def particular(d: Operands, p: Packing | None) -> frozenset[str]:
    """Features of table.ONCE_MORE that the tensors and numbers of this call have."""
    right, keys = reach(d, p)[1], longest(d, p)[1]
    mask = d.mask
    used = {
        "wide_mask": mask is not None and mask.dtype not in (torch.bool, d.q.dtype),
        "ahead": right >= keys > 0,
        "scale": d.scale <= 0.0,
    }
    return frozenset(name for name, there in used.items() if there)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def one_size(d: Operands) -> int:
    """Of heads, when queries, keys and values are padded alike. Above 192 kernels for 256 exist
    everywhere, those between do not."""
    size = round_up(max(d.q.shape[-1], d.v.shape[-1]), 8)
    return 256 if 192 < size <= 256 else size


def rows(t: Tensor, size: int) -> Tensor:
    """`t` with heads of `size`, zeros behind, rows of 16 bytes at addresses that divide so."""
    if t.shape[-1] != size:
        return F.pad(t, (0, size - t.shape[-1]))
    bytes_ = t.element_size()
    even = all(
        stride * bytes_ % ROW_BYTES == 0
        for stride, extent in zip(t.stride()[:-1], t.shape[:-1], strict=True)
        if extent > 1
    )
    if t.stride(-1) == 1 and even and t.data_ptr() % ROW_BYTES == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def finished(d: Operands, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """out of heads Dv, contiguous; lse with -inf for a row that sees nothing; sinks applied."""
    out, lse = out[..., : d.v.shape[-1]], lse.masked_fill(lse == torch.inf, -torch.inf)
    if d.sinks is not None:
        sinks = d.sinks.to(lse.dtype).view(-1, 1)
        total = torch.logaddexp(lse, sinks)
        share = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0))
        out, lse = (out * share.transpose(-1, -2).unsqueeze(-1)).to(out.dtype), total
    return out.contiguous(), lse.contiguous()


def closed(lse: Tensor) -> Tensor:
    """The log-sum-exp for a kernel that makes e^(z - lse) of it: 0 in a row that sees nothing."""
    return lse.masked_fill(lse == -torch.inf, torch.inf).contiguous()


def positions(d: Operands, p: Packing | None) -> tuple[Tensor | None, Tensor]:
    """(sequence of each packed row, or None; position of each row among its keys)."""
    device = d.q.device
    if p is None:
        return None, torch.arange(d.q.shape[1], device=device) + d.k.shape[1] - d.q.shape[1]
    row = torch.arange(d.q.shape[0], device=device, dtype=torch.int32)
    b = torch.searchsorted(p.q, row, right=True) - 1
    return b, row - p.q[b] + (p.k.diff() - p.q.diff())[b]
