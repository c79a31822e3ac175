"""The registered operator of attention_decode: schema, implementation, fake. Torch only.

Not differentiable. `window` has causal folded in; softcap 0 is none, num_splits 0 leaves the choice
to the backend; the slopes are 2-D.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_kernels._backends import cpu as cpu_library
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops._eager import unwatched
from lora_kernels.ops.attention.problem import OP, AttentionProblem, choose

_MODULES = {
    "reference": "decode_reference", "aten": "decode_aten", "cpu": "decode_cpu",
    "triton": "triton_decode_host",
}  # fmt: skip
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
    device = q.device.type
    fields: dict[str, Any] = {
        "S": q.shape[1], "H": q.shape[2], "D": q.shape[3], "Hk": k_cache.shape[2],
        "Dv": v_cache.shape[3], "window": (window[0], window[1]), "softcap": softcap,
        "sinks": sinks is not None, "alibi": alibi_slopes is not None, "dtype": q.dtype,
        "device": device, "cache": "contiguous" if block_table is None else "paged",
    }  # fmt: skip
    if device == "cpu":
        _check_values(cache_seqlens, block_table, capacity, k_cache)
        disabled = os.environ.get("LORA_KERNELS_DISABLE", "")
        module = _cpu_module(tuple(fields.items()), backend, disabled, _isa())
    else:
        problem = AttentionProblem(B=q.shape[0], Sk=capacity, **fields)
        module = _module(choose(problem, backend)[0])
    with without_autocast(q.device.type):
        out, lse = module.attention_decode(
            q, k_cache, v_cache, cache_seqlens, block_table, sinks, alibi_slopes, scale,
            (window[0], window[1]), softcap, num_splits,
        )  # fmt: skip
    return out, lse


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"lora_kernels.ops.{OP}.{_MODULES[name]}")


def _isa() -> str:
    library, reason = cpu_library.load()
    return reason if library is None else library.isa()


@functools.lru_cache(maxsize=256)
def _cpu_module(fields: tuple[Any, ...], backend: str, disabled: str, isa: str) -> ModuleType:
    """Cached on all that the choice depends on, which the number of sequences and of keys is not:
    they change from token to token. `disabled` and `isa` serve the key alone."""
    return _module(choose(AttentionProblem(B=1, Sk=1, **dict(fields)), backend)[0])


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

_decode_op = torch.ops.lora_kernels.attention_decode.default


def decode(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The registered op, called directly where nothing can tell the difference."""
    return _decode(q, *args) if unwatched(q) else _decode_op(q, *args)
