"""attention_decode on Triton kernels: one launch, and a second one where the keys are split.

Caches may have any strides. Nothing is copied and nothing waits for the device, so the calls can be
captured in a graph: lengths and tables are read by the kernels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lora_kernels._backends import triton as backend
from lora_kernels.ops.attention import triton as host
from lora_kernels.ops.attention import triton_configs


@functools.cache
def _kernels() -> tuple[Any, Any]:
    from lora_kernels.ops.attention import triton_decode

    return triton_decode.decode, triton_decode.combine


def _strides(t: Tensor, unit: int) -> tuple[int, ...]:
    *outer, column = t.stride()
    return (*(s // unit for s in outer), column)


def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    sinks: Tensor | None, alibi_slopes: Tensor | None, scale: float, window: tuple[int, int],
    softcap: float, num_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, S, H, Dv] in the dtype of q, lse [B, H, S])."""
    batch, rows, heads, size = q.shape
    groups, value_size, page = k_cache.shape[2], v_cache.shape[3], k_cache.shape[1]
    paged = block_table is not None
    pages = 1 if block_table is None else block_table.shape[1]
    capacity = page * pages
    out = q.new_empty(batch, rows, heads, value_size)
    lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    group_rows = heads // groups * rows
    where = host.target_of(q)
    tile = triton_configs.decode(group_rows, size, value_size, q.element_size(), where)
    programs = -(-group_rows // tile.rows) * batch * groups
    splits = num_splits or triton_configs.decode_splits(programs, capacity, tile.keys, where)
    partial = splits > 1
    parts, part_lse = out, lse
    if partial:
        parts = q.new_empty((splits, *out.shape), dtype=torch.float32)
        part_lse = q.new_empty((splits, *lse.shape), dtype=torch.float32)
    q, k_cache, v_cache = (host.reachable(t) for t in (q, k_cache, v_cache))
    unit = host.unit(q, k_cache, v_cache)
    (d1, d2), (v1, v2) = (triton_configs.parts(n) for n in (size, value_size))
    left, right = window
    # A side that excludes no key costs nothing; a sequence may be shorter than the capacity.
    left, right = (-1 if left >= capacity - 1 else left), (-1 if right >= rows - 1 else right)
    slopes = None if alibi_slopes is None else alibi_slopes.expand(batch, heads)
    kernel, combine = _kernels()
    with host.on_device(q), host.arithmetic():
        kernel[(programs, splits)](
            q, k_cache, v_cache, parts, part_lse, q if sinks is None else sinks,
            q if slopes is None else slopes, cache_seqlens,
            cache_seqlens if block_table is None else block_table.contiguous(),
            *(_strides(t, unit) for t in (q, k_cache, v_cache)),
            (0, 0) if slopes is None else slopes.stride(), pages, batch, rows, heads, groups,
            heads // groups, capacity, k_cache.shape[0], page, left, right, scale, softcap, splits,
            D=size, DV=value_size, D1=d1, D2=d2, V1=v1, V2=v2, BM=tile.rows, BN=tile.keys,
            UNIT=unit, PAGED=paged, HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0,
            SOFTCAP=softcap != 0.0, SINKS=sinks is not None, ALIBI=slopes is not None,
            PARTIAL=partial, PRECISION=backend.precision(q.dtype),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if partial:
            combine[(batch * heads * rows,)](
                parts, part_lse, q if sinks is None else sinks, out, lse, batch, rows, heads,
                splits, DV=value_size, V=1 << (value_size - 1).bit_length(),
                MOST=1 << (splits - 1).bit_length(), SINKS=sinks is not None, num_warps=1,
            )  # fmt: skip
    return out, lse
