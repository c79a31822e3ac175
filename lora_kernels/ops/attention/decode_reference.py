"""Oracle of attention_decode: keys of each sequence laid out, and the formulas of reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops.attention import reference


def sequence(cache: Tensor, table: Tensor | None, b: int, length: int) -> Tensor:
    """[1, length, Hk, D]: the first `length` rows that sequence b has in the cache."""
    if table is None:
        return cache[b : b + 1, :length]
    pages = table[b, : -(-length // cache.shape[1])].long()
    return cache[pages].flatten(0, 1)[None, :length]


def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    sinks: Tensor | None, alibi_slopes: Tensor | None, scale: float, window: tuple[int, int],
    softcap: float, num_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, S, H, Dv] in the dtype of q, lse [B, H, S])."""
    outs, lses = [], []
    for b, length in enumerate(cache_seqlens.tolist()):
        slopes = alibi_slopes
        if slopes is not None and slopes.shape[0] > 1:
            slopes = slopes[b : b + 1]
        out, lse = reference.attention_fwd(
            q[b : b + 1], sequence(k_cache, block_table, b, length),
            sequence(v_cache, block_table, b, length), sinks, None, None, None, slopes, None, scale,
            window, softcap, 0.0, True,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    if not outs:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        empty = q.new_empty((*q.shape[:-1], v_cache.shape[-1]))
        return empty, q.new_empty((0, q.shape[2], q.shape[1]), dtype=wide)
    return torch.cat(outs), torch.cat(lses)
