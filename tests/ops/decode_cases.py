"""Caches for the tests of attention_decode, and the fp64 answer: attention over each sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops import attention_decode
from lora_kernels.testing import assert_within_budget, moved
from lora_kernels.testing.attention import AttentionInputs, results
from lora_kernels.testing.inputs import relayout

CASES: dict[str, dict[str, Any]] = {
    "one token": {},
    "four tokens": {"S": 4},
    "not causal": {"S": 3, "causal": False},
    "window": {"S": 2, "window": (5, 0)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True, "S": 2},
    "alibi": {"alibi": True, "S": 2},
    "multi-query": {"Hk": 1, "S": 3},
    "value size": {"Dv": 24},
    "all": {
        "S": 3, "window": (9, 0), "softcap": 2.0, "sinks": True, "alibi": True, "Dv": 8, "Hk": 1,
    },
}  # fmt: skip


@dataclass(frozen=True)
class DecodeInputs:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lengths: tuple[int, ...]
    block_table: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def cache_seqlens(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.q.device)

    def arguments(self) -> dict[str, Any]:
        return {
            "q": self.q, "k_cache": self.k_cache, "v_cache": self.v_cache,
            "cache_seqlens": self.cache_seqlens, "block_table": self.block_table, **self.options,
        }  # fmt: skip

    def sequence(self, name: str, b: int) -> Tensor:
        """[length, Hk, D] of sequence b, read key by key."""
        cache, n = getattr(self, f"{name}_cache"), self.lengths[b]
        if self.block_table is None:
            return cache[b, :n]
        size = cache.shape[1]
        rows = [cache[self.block_table[b, j // size], j % size] for j in range(n)]
        return torch.stack(rows) if rows else cache[0, :0]


def decode_inputs(
    lengths: tuple[int, ...] = (7, 0, 12),
    S: int = 1,
    H: int = 4,
    D: int = 16,
    Hk: int = 2,
    Dv: int = 0,
    *,
    page: int = 0,
    dtype: torch.dtype = torch.float32,
    sinks: bool = False,
    alibi: bool = False,
    layout: str = "contiguous",
    **options: Any,
) -> DecodeInputs:
    """Caches that hold NaN where no sequence has a key; pages in a drawn order, `page` 0: none."""
    generator = torch.Generator().manual_seed(0)
    batch, Dv = len(lengths), Dv or D

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    capacity = max([*lengths, 1])
    k, v = (normal(batch, capacity, Hk, size) for size in (D, Dv))
    past = torch.arange(capacity) >= torch.tensor(lengths or [0])[:batch, None]
    k[past[:batch]], v[past[:batch]] = torch.nan, torch.nan
    table = None
    if page:
        pages = -(-capacity // page)
        table = torch.randperm(batch * pages + 2, generator=generator)[: batch * pages]
        table = table.view(batch, pages).int()
        pools = []
        for dense in (k, v):
            pool = dense.new_full((batch * pages + 2, page, Hk, dense.shape[-1]), torch.nan)
            for b, j in ((b, j) for b in range(batch) for j in range(capacity)):
                pool[table[b, j // page], j % page] = dense[b, j]
            pools.append(pool)
        k, v = pools
    if sinks:
        options["sinks"] = normal(H).float() + 1.0
    if alibi:
        options["alibi_slopes"] = torch.linspace(0.1, 0.6, H)
    return DecodeInputs(
        relayout(normal(batch, S, H, D, std=1.5), layout), relayout(k, layout, float("nan")),
        relayout(v, layout, float("nan")), lengths, table, options,
    )  # fmt: skip


def check_decode(i: DecodeInputs, backend: str, device: str = "cpu", **more: Any) -> None:
    """Output and log-sum-exp of every sequence within the budget of plain PyTorch."""
    arguments = moved(i, device).arguments()
    out, lse = attention_decode(**arguments, return_lse=True, backend=backend, **more)
    out, lse = out.cpu(), lse.cpu()
    given = dict(i.options)
    tensors = {name: given.pop(name, None) for name in ("sinks", "alibi_slopes")}
    given = {"causal": True, "return_lse": True, **given}
    for b in range(len(i.lengths)):
        k, v = (i.sequence(name, b)[None] for name in ("k", "v"))
        one = AttentionInputs(i.q[b : b + 1], k, v, **tensors, options=given)
        want, low = (results(one, dtype) for dtype in (torch.float64, i.q.dtype))
        nothing = want["lse"] == -torch.inf
        assert torch.equal(lse[b : b + 1] == -torch.inf, nothing)
        got = {"out": out[b : b + 1], "lse": lse[b : b + 1].masked_fill(nothing, 0.0)}
        for name, t in got.items():
            exact, plain = (r[name].masked_fill(nothing, 0.0) if name == "lse" else r[name]
                            for r in (want, low))  # fmt: skip
            assert_within_budget(t, exact, plain, f"{backend}: {name} of sequence {b}")
