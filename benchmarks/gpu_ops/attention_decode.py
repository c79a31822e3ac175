"""Cases of attention's row with a cache of keys: attention_decode, which has no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_ops.attention_libraries import library_of, taking
from benchmarks.gpu_ops.row import Keywords, Work
from benchmarks.peers import UnavailableError, load
from lora_kernels.ops.attention.decode import attention_decode
from lora_kernels.testing import AttentionInputs
from lora_kernels.testing.attention import results


@dataclass(frozen=True)
class DecodeInputs:
    """Arguments of the op; `options` are its keyword arguments that are not tensors."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    block_table: Tensor | None
    options: Keywords

    def results(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """out and lse of the formula, sequence by sequence, from tensors of `dtype`."""
        made = []
        for b, n in enumerate(self.cache_seqlens.tolist()):
            k, v = (self._sequence(t, b, n) for t in (self.k_cache, self.v_cache))
            options = {"causal": True, "return_lse": True, **self.options}
            made.append(results(AttentionInputs(self.q[b : b + 1], k, v, options=options), dtype))
        return {name: torch.cat([one[name] for one in made]) for name in ("out", "lse")}

    def _sequence(self, cache: Tensor, b: int, n: int) -> Tensor:
        if self.block_table is None:
            return cache[b : b + 1, :n]
        return cache[self.block_table[b].long()].flatten(0, 1)[None, :n]


def decode_inputs(
    cache: str,
    lengths: Sequence[int],
    H: int,
    D: int,
    *,
    S: int = 1,
    Hk: int | None = None,
    dtype: torch.dtype = torch.float32,
    capacity: int = 0,
    page: int = 16,
    generator_seed: int = 0,
    **options: Any,
) -> DecodeInputs:
    """S new queries for each of `lengths`; a cache of at least `capacity` keys, where paged in
    pages that lie in another order than that of the sequences."""
    generator = torch.Generator().manual_seed(generator_seed)
    B, rows = len(lengths), max(capacity, *lengths)
    shape, table = (B, rows), None
    if cache == "paged":
        each = -(-rows // page)
        order = torch.randperm(B * each, generator=generator)
        table, shape = order.view(B, each).int(), (B * each, page)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    return DecodeInputs(
        q=normal(B, S, H, D, std=1.5),
        k_cache=normal(*shape, Hk or H, D),
        v_cache=normal(*shape, Hk or H, D),
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        options=options,
    )


def decode_work(i: DecodeInputs, provider: str, peers: tuple[str, ...]) -> Work:
    if provider == "flash-attn":
        if i.block_table is not None or i.options:
            raise UnavailableError("flash-attn is called here for a plain contiguous cache")
        theirs = load("flash_attn", "flash_attn_with_kvcache")
        return Work(
            lambda: {
                "out": theirs(i.q, i.k_cache, i.v_cache, cache_seqlens=i.cache_seqlens, causal=True)
            }
        )
    library = library_of(provider)
    if library is not None:

        def by_library() -> dict[str, Tensor]:
            with taking(library):
                made = attention_decode(
                    i.q, i.k_cache, i.v_cache, i.cache_seqlens, block_table=i.block_table,
                    **i.options, return_lse=True, backend="aten",
                )  # fmt: skip
            return dict(zip(("out", "lse"), made, strict=True))

        return Work(by_library)
    if provider in peers:
        raise UnavailableError(f"{provider} has no cache with lengths of its own")

    def forward() -> dict[str, Tensor]:
        out, lse = attention_decode(
            i.q, i.k_cache, i.v_cache, i.cache_seqlens, block_table=i.block_table,
            return_lse=True, backend=provider, **i.options,
        )  # fmt: skip
        return {"out": out, "lse": lse}

    return Work(forward)


def decode_problem(i: DecodeInputs) -> Keywords:
    B, S, H, D = i.q.shape
    capacity = i.k_cache.shape[1] * (1 if i.block_table is None else i.block_table.shape[1])
    return {
        "B": B, "S": S, "H": H, "D": D, "Sk": capacity, "Hk": i.k_cache.shape[2], "Dv": D,
        "causal": True, "window": i.options.get("window"), "softcap": i.options.get("softcap"),
        "dtype": i.q.dtype, "cache": "contiguous" if i.block_table is None else "paged",
    }  # fmt: skip
