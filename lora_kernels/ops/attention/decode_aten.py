"""attention_decode over library calls: the cache as a batch, what a sequence lacks masked.

Pages are gathered into one tensor first. Nothing waits for a GPU; on the CPU the batch is as long
as its longest sequence. On a GPU a library's kernel that reads the cache where it lies comes first
(libraries/decode.py), and without ALiBi the heads of a group are rows of one, so that no key is
written out for each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops.attention import aten
from lora_kernels.ops.attention.libraries import decode, form
from lora_kernels.ops.attention.operands import Operands
from lora_kernels.ops.attention.problem import AttentionProblem


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
    """[B, 1 or H, S, keys], fp32 or fp64: ALiBi, and -inf for what a query does not see. On a GPU
    without ALiBi boolean, which kernels of every dtype take."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = torch.arange(q.shape[1], device=q.device)[:, None]
    i = lengths.view(-1, 1, 1, 1) - q.shape[1] + rows  # the query's position
    j = torch.arange(keys, device=q.device)
    seen = j < lengths.view(-1, 1, 1, 1)
    if window[0] >= 0:
        seen = seen & (j >= i - window[0])
    if window[1] >= 0:
        seen = seen & (j <= i + window[1])
    if slopes is None and _on_gpu(q):
        return seen
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
    if _on_gpu(q) and keys and 0 not in q.shape[:2]:
        made = _by_library(
            q, k_cache, v_cache, lengths, block_table, sinks, alibi_slopes, scale, window, softcap,
            num_splits,
        )  # fmt: skip
        if made is not None:
            return _marked(*made, _out_of_range(lengths, block_table, k_cache))
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
    if bias is not None and bias.dtype == torch.bool:
        out, lse = _grouped(q, k, v, sinks, bias, scale, softcap)
    else:
        out, lse = aten.attention_fwd(
            q, k, v, sinks, bias, None, None, None, None, scale, (-1, -1), softcap, 0.0, True
        )  # fmt: skip
    if _on_gpu(q):
        return _marked(out, lse, _out_of_range(lengths, block_table, k_cache))
    return out, lse


def _on_gpu(t: Tensor) -> bool:
    return t.device.type != "cpu"


def _marked(out: Tensor, lse: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
    """NaN for sequences that cannot be read."""
    return (
        out.masked_fill(bad[:, None, None, None], torch.nan),
        lse.masked_fill(bad[:, None, None], torch.nan),
    )


def _by_library(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, table: Tensor | None,
    sinks: Tensor | None, slopes: Tensor | None, scale: float, window: tuple[int, int],
    softcap: float, num_splits: int,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """(out, lse) by a kernel that reads the cache, or None where there is none."""
    capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
    if table is not None:
        table = table.clamp(0, max(k_cache.shape[0] - 1, 0)).to(torch.int32)
    if k_cache.shape[0] == 0:
        return None
    cache = decode.Cache(
        q, k_cache, v_cache, lengths.clamp(0, capacity).to(torch.int32), table, scale, window,
        softcap, num_splits,
    )  # fmt: skip
    problem = AttentionProblem(
        B=q.shape[0], S=q.shape[1], H=q.shape[2], D=q.shape[3], Sk=capacity, Hk=k_cache.shape[2],
        Dv=v_cache.shape[3], window=window, softcap=softcap, sinks=sinks is not None,
        alibi=slopes is not None, dtype=q.dtype, device=q.device.type,
        cache="contiguous" if table is None else "paged",
    )  # fmt: skip
    with torch.cuda.device_of(q):
        library, _ = decode.choose(problem, cache)
    if library is None:
        return None
    d = _operands(q, k_cache, v_cache, sinks, scale)
    return form.finished(d, *decode.run(library, cache))


def _operands(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float) -> Operands:
    return Operands(q, k, v, sinks, None, None, None, scale, (-1, -1), 0.0, 0.0)


def _grouped(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, seen: Tensor, scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) with the heads of a group as rows of one; sinks, which differ, come after."""
    rows, groups = q.shape[1], k.shape[2]
    group = q.shape[2] // groups
    folded = q.unflatten(2, (groups, group)).transpose(2, 3).flatten(1, 2)  # row (i, head of group)
    mask = seen if seen.shape[2] == 1 else seen.repeat_interleave(group, 2)
    out, lse = aten.attention_fwd(
        folded, k, v, None, mask, None, None, None, None, scale, (-1, -1), softcap, 0.0, True
    )  # fmt: skip
    out = out.unflatten(1, (rows, group)).transpose(2, 3).flatten(2, 3)
    lse = lse.unflatten(2, (rows, group)).transpose(2, 3).flatten(1, 2)
    return form.finished(_operands(q, k, v, sinks, scale), out, lse)


def _out_of_range(lengths: Tensor, table: Tensor | None, k_cache: Tensor) -> Tensor:
    """[B]: sequences that are longer than the cache, or have a page that is none."""
    page = k_cache.shape[1]
    capacity = page if table is None else page * table.shape[1]
    bad = (lengths < 0) | (lengths > capacity)
    if table is not None:
        read = torch.arange(table.shape[1], device=table.device) * page < lengths[:, None]
        bad = bad | (read & ((table < 0) | (table >= k_cache.shape[0]))).any(1)
    return bad
