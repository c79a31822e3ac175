"""The registered operator of attention_decode: schema, implementation, fake. Torch only.

Not differentiable. `window` has causal folded in; softcap 0 is none, num_splits 0 leaves the choice
to the backend; the slopes are 2-D.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops.attention.problem import OP, AttentionProblem, choose

_MODULES = {"reference": "decode_reference", "aten": "decode_aten", "triton": "triton_decode_host"}
_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, "
    "Tensor? block_table, Tensor? sinks, Tensor? alibi_slopes, float scale, int[] window, "
    "float softcap, int num_splits, str backend) -> (Tensor out, Tensor lse)"
)


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    sinks: Tensor | None, alibi_slopes: Tensor | None, scale: float, window: list[int],
    softcap: float, num_splits: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    page = k_cache.shape[1]
    capacity = page if block_table is None else page * block_table.shape[1]
    if q.device.type == "cpu":
        _check_values(cache_seqlens, block_table, capacity, k_cache)
    problem = AttentionProblem(
        B=q.shape[0], S=q.shape[1], H=q.shape[2], D=q.shape[3], Sk=capacity, Hk=k_cache.shape[2],
        Dv=v_cache.shape[3], window=(window[0], window[1]), softcap=softcap,
        sinks=sinks is not None, alibi=alibi_slopes is not None, dtype=q.dtype,
        device=q.device.type, cache="contiguous" if block_table is None else "paged",
    )  # fmt: skip
    name, _ = choose(problem, backend)
    module = importlib.import_module(f"lora_kernels.ops.{OP}.{_MODULES[name]}")
    with torch.autocast(q.device.type, enabled=False):
        out, lse = module.attention_decode(
            q, k_cache, v_cache, cache_seqlens, block_table, sinks, alibi_slopes, scale,
            (window[0], window[1]), softcap, num_splits,
        )  # fmt: skip
    return out, lse


def _check_values(
    cache_seqlens: Tensor, block_table: Tensor | None, capacity: int, k_cache: Tensor
) -> None:
    """What a GPU would have to be waited for."""
    lengths = cache_seqlens.tolist()
    for n in lengths:
        if not 0 <= n <= capacity:
            raise InvalidArgumentError(
                f"attention_decode: cache_seqlens holds {n}; accepted: 0 to {capacity}, what the "
                "cache can hold"
            )
    if block_table is not None:
        pages, size = k_cache.shape[:2]
        for row, n in zip(block_table.tolist(), lengths, strict=True):
            for page in row[: -(-n // size)]:
                if not 0 <= page < pages:
                    raise InvalidArgumentError(
                        f"attention_decode: block_table holds {page}; accepted: 0 to {pages - 1}, "
                        "the pages of k_cache"
                    )


def _decode_fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    sinks: Tensor | None, alibi_slopes: Tensor | None, scale: float, window: list[int],
    softcap: float, num_splits: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((*q.shape[:-1], v_cache.shape[-1]))
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)


for _key in ("CPU", "CUDA"):
    _library.impl("attention_decode", _decode, _key)
torch.library.register_fake("lora_kernels::attention_decode", _decode_fake, lib=_library)

decode = torch.ops.lora_kernels.attention_decode.default
