"""attention_decode over library calls: the cache as a batch, what a sequence lacks masked.

Pages are gathered into one tensor first. Nothing waits for a GPU; on the CPU the batch is as long
as its longest sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops.attention import aten


def _dense(cache: Tensor, table: Tensor | None, keys: int) -> Tensor:
    """[B, keys, Hk, D]; pages that do not exist are page 0, which the mask hides."""
    if table is None:
        return cache[:, :keys]
    pages = table[:, : -(-keys // cache.shape[1])].long()
    if cache.shape[0] == 0:
        return cache.new_zeros(table.shape[0], keys, *cache.shape[2:])
    inside = (pages >= 0) & (pages < cache.shape[0])
    return cache[pages.masked_fill(~inside, 0)].flatten(1, 2)[:, :keys]


def _bias(
    q: Tensor, lengths: Tensor, slopes: Tensor | None, window: tuple[int, int], keys: int
) -> Tensor:
    """[B, 1 or H, S, keys], fp32 or fp64: ALiBi, and -inf for what a query does not see."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = torch.arange(q.shape[1], device=q.device)[:, None]
    i = lengths.view(-1, 1, 1, 1) - q.shape[1] + rows  # the query's position
    j = torch.arange(keys, device=q.device)
    seen = j < lengths.view(-1, 1, 1, 1)
    if window[0] >= 0:
        seen = seen & (j >= i - window[0])
    if window[1] >= 0:
        seen = seen & (j <= i + window[1])
    bias = torch.zeros((), dtype=wide, device=q.device)
    if slopes is not None:
        bias = -slopes.to(wide)[:, :, None, None] * (i - j).abs()
    return torch.where(seen, bias, -torch.inf)


def _all_keys(
    q: Tensor, lengths: Tensor, slopes: Tensor | None, window: tuple[int, int], keys: int
) -> bool:
    """One query each, which sees all keys, as many as the others. Asked on the CPU alone."""
    return (
        q.device.type == "cpu" and q.shape[1] == 1 and keys > 0 and slopes is None
        and window[0] < 0 and window[1] >= -1 and bool((lengths == keys).all())
    )  # fmt: skip


def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    sinks: Tensor | None, alibi_slopes: Tensor | None, scale: float, window: tuple[int, int],
    softcap: float, num_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, S, H, Dv] in the dtype of q, lse [B, H, S])."""
    keys = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if q.device.type == "cpu" and q.shape[0]:
        keys = int(cache_seqlens.max())
    lengths = cache_seqlens.long()
    if _all_keys(q, lengths, alibi_slopes, window, keys):
        k, v, bias = (*(_dense(t, block_table, keys) for t in (k_cache, v_cache)), None)
    elif keys == 0 or 0 in q.shape[:2]:
        k, v, bias = k_cache[:0], v_cache[:0], None
        k, v = (t.new_empty(q.shape[0], 0, *t.shape[2:]) for t in (k, v))
    else:
        unused = (torch.arange(keys, device=q.device) >= lengths[:, None])[:, :, None, None]
        # What was never written may be NaN, which a weight of 0 does not hide.
        k, v = (_dense(t, block_table, keys).masked_fill(unused, 0.0) for t in (k_cache, v_cache))
        bias = _bias(q, lengths, alibi_slopes, window, keys)
    out, lse = aten.attention_fwd(
        q, k, v, sinks, bias, None, None, None, None, scale, (-1, -1), softcap, 0.0, True
    )  # fmt: skip
    if q.device.type != "cpu":
        bad = _out_of_range(lengths, block_table, k_cache)
        out = out.masked_fill(bad[:, None, None, None], torch.nan)
        lse = lse.masked_fill(bad[:, None, None], torch.nan)
    return out, lse


def _out_of_range(lengths: Tensor, table: Tensor | None, k_cache: Tensor) -> Tensor:
    """[B]: sequences that are longer than the cache, or have a page that is none."""
    page = k_cache.shape[1]
    capacity = page if table is None else page * table.shape[1]
    bad = (lengths < 0) | (lengths > capacity)
    if table is not None:
        read = torch.arange(table.shape[1], device=table.device) * page < lengths[:, None]
        bad = bad | (read & ((table < 0) | (table >= k_cache.shape[0]))).any(1)
    return bad
