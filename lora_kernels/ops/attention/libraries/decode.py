"""Library kernels that read a cache of keys where it lies, for attention_decode on a GPU.

flash_attn_with_kvcache of FlashAttention 3 and 2 (pages of any length, or of a multiple of 256
keys), and aten::_flash_attention_forward, where a contiguous cache is one packed sequence of B
times its capacity and `seqused_k` says how much of each part counts. Causal and windows are aligned
at each sequence's own length; splits of the keys are added in one order. Nothing waits for the
device. As for attention, a kernel is checked against the formula before it is first used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops.attention.libraries import (
    BLOCKS,
    VARIABLE,
    flash,
    flash_attn_2,
    flash_attn_3,
    form,
    here,
    proof,
    requested,
    table,
)
from lora_kernels.ops.attention.problem import AttentionProblem

ORDER = ("flash-attn-3", "flash-attn-2", "flash")
PAGE_OF_2 = 256
_MODULES = {"flash-attn-3": flash_attn_3, "flash-attn-2": flash_attn_2, "flash": flash}


@dataclass(frozen=True)
class Cache:
    """q [B, S, H, D]; k and v [B, C, Hk, D], or pages [P, page, Hk, D] and their int32 table
    [B, pages]; lengths int32 [B]. Lengths and pages are in range."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    table: Tensor | None
    scale: float
    window: tuple[int, int]
    softcap: float
    num_splits: int

    @property
    def capacity(self) -> int:
        return self.k.shape[1] * (1 if self.table is None else self.table.shape[1])

    @property
    def sides(self) -> tuple[int, int]:
        left, right = self.window
        return -1 if left >= self.capacity - 1 else left, -1 if right >= self.q.shape[
            1
        ] - 1 else right


def static(library: str, problem: AttentionProblem, where: here.Device | None) -> str:
    """Why `library` cannot run it, as far as the problem tells."""
    why = table.lacking(library, problem.features())
    if why:
        return why
    if problem.alibi:
        return "it is not called with ALiBi for a cache"
    if problem.window[1] > 0:
        return "a window that reaches ahead"
    if problem.D % 8 or problem.Dv != problem.D:
        return "heads would have to be padded, which copies the cache"
    if library == "flash" and problem.cache == "paged":
        return "torch's operator is not called with pages"
    if where is None:
        return "torch sees no GPU here"
    why = _MODULES[library].limits(problem, "fwd", where)
    if why or library == "flash":
        return why or here.unknown_arguments(flash._forward, ("seqused_k",))
    package, _ = here.load(_MODULES[library].PACKAGE)
    if not hasattr(package, "flash_attn_with_kvcache"):
        return f"{_MODULES[library].PACKAGE} has no flash_attn_with_kvcache"
    return ""


def _tensors(library: str, c: Cache) -> str:
    """Why `library` cannot read these tensors."""
    if c.scale <= 0.0:
        return table.LACKS[library]["scale"]
    if any(form.rows(t, t.shape[-1]) is not t for t in (c.k, c.v)):
        return "rows of the cache do not lie at multiples of 16 bytes"
    if library == "flash-attn-2" and c.table is not None and c.k.shape[1] % PAGE_OF_2:
        return f"pages do not hold a multiple of {PAGE_OF_2} keys"
    if library == "flash" and any(t.stride(0) != t.shape[1] * t.stride(1) for t in (c.k, c.v)):
        return "the cache of a sequence does not follow that of the one before"
    return ""


def choose(problem: AttentionProblem, cache: Cache | None = None) -> tuple[str | None, str]:
    """(library or None, reason); without tensors what the problem alone allows, nothing checked.

    Raises:
        BackendUnavailableError: LORA_KERNELS_ATEN_ATTENTION names one that cannot run it.
    """
    name = requested()
    passed_over: list[str] = []
    where = here.device()
    for library in ORDER:
        if name not in ("auto", library) or name == BLOCKS:
            continue
        why = static(library, problem, where)
        if not why and cache is not None and where is not None:
            why = _tensors(library, cache) or _failure(library, problem, cache, where.name)
        if not why:
            return library, "; ".join([table.TITLES[library], *passed_over])
        passed_over.append(f"{library}: {why}")
    if name in ORDER and cache is not None:
        raise BackendUnavailableError(
            f"attention_decode: {VARIABLE}={name!r} cannot run this problem: {passed_over[0]}"
        )
    return None, "; ".join(passed_over)


def run(library: str, c: Cache) -> tuple[Tensor, Tensor]:
    """out [B, S, H, D] and lse [B, H, S], natural, +inf or -inf where nothing is seen."""
    left, right = c.sides
    causal = (left, right) == (-1, 0)
    q = form.rows(c.q, c.q.shape[-1])
    if library == "flash":
        batch, rows, heads, size = q.shape
        at = torch.arange(batch + 1, device=q.device, dtype=torch.int32)
        k, v = (t.flatten(0, 1) for t in (c.k, c.v))
        out, lse, *_ = flash._forward(
            q.flatten(0, 1), k, v, at * rows, at * c.capacity, rows, c.capacity, 0.0, causal, False,
            scale=c.scale, window_size_left=left, window_size_right=right, seqused_k=c.lengths,
        )  # fmt: skip
        return out.view(batch, rows, heads, size), lse.view(heads, batch, rows).transpose(0, 1)
    package, _ = here.load(_MODULES[library].PACKAGE)
    pages = {"page_table" if library == "flash-attn-3" else "block_table": c.table}
    out, lse, *_ = package.flash_attn_with_kvcache(
        q, c.k, c.v, cache_seqlens=c.lengths, softmax_scale=c.scale, causal=causal,
        window_size=(left, right), softcap=c.softcap, num_splits=c.num_splits,
        return_softmax_lse=True, **pages,
    )  # fmt: skip
    return out, lse


def _failure(library: str, problem: AttentionProblem, c: Cache, device: str) -> str:
    left, right = c.sides
    rows = min(c.q.shape[1], 3)
    page = 0 if c.table is None else c.k.shape[1]
    key = (
        "cache", library, device, problem.D, problem.Hk != problem.H, rows, left >= 0, right,
        problem.softcap != 0.0, page, problem.dtype,
    )  # fmt: skip
    return proof.once(key, lambda: _compare(library, problem, (left, right), rows, page, device))


def _compare(
    library: str, p: AttentionProblem, sides: tuple[int, int], rows: int, page: int, device: str
) -> str:
    """What is off, on three sequences; NaN past their keys."""
    from lora_kernels.ops.attention import decode_reference

    lengths = torch.tensor([161, 0, 77], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    heads, groups = (4, 2) if p.Hk != p.H else (2, 2)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    k, v = (normal(3, 200, groups, p.D) for _ in range(2))
    past = torch.arange(200) >= lengths[:, None]
    k[past], v[past] = torch.nan, torch.nan
    pages = None
    if page:
        each = -(-200 // page)
        pages = torch.randperm(3 * each, generator=generator).view(3, each).int()
        pools = []
        for t in (k, v):
            wide = t.new_full((3, each * page, groups, p.D), torch.nan)
            wide[:, :200] = t
            pool = torch.empty(3 * each, page, groups, p.D)
            pool[pages.flatten().long()] = wide.unflatten(1, (each, page)).flatten(0, 1)
            pools.append(pool)
        k, v = pools
        pages = pages.to(device)
    q, k, v = (t.to(device, p.dtype) for t in (normal(3, rows, heads, p.D, std=1.5), k, v))
    window = (31 if sides[0] >= 0 else -1, sides[1])
    softcap = 3.0 if p.softcap else 0.0
    c = Cache(q, k, v, lengths.to(device), pages, p.D**-0.5, window, softcap, 0)
    every: Any = (
        *(t.double() for t in (q, k, v)), c.lengths, pages, None, None, c.scale, window, softcap, 0,
    )  # fmt: skip
    want = decode_reference.attention_decode(*every)
    got = run(library, c)
    for name, a, b in zip(("out", "lse"), got, want, strict=True):
        a = a.double().masked_fill(a == torch.inf, -torch.inf)
        wrong = proof.off(name, a, b, proof.ALLOWED[p.dtype])
        if wrong:
            return f"failed its check against fp64 on this device: {wrong}"
    return ""
