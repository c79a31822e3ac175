"""attention_decode on the compiled CPU library (csrc/attention/decode.h): the rows that share a key
head read its keys once, from where they lie in the cache or in its pages."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels._backends import cpu as backend
from lora_kernels.ops.attention import cpu, decode_reference
from lora_kernels.ops.attention.problem import AttentionProblem


def supports(problem: AttentionProblem) -> tuple[bool, str]:
    able, why = cpu.supports(problem)
    if not able:
        return able, why
    module, _ = backend.load()
    if not hasattr(module, "attention_decode"):
        return False, "lora_kernels._C predates attention_decode; rebuild it"
    if _many(problem.S * (problem.H // problem.Hk)):
        return True, f"{why}, one sequence after the other"
    return True, "keys are read where they lie in the cache"


def outruns_aten(problem: AttentionProblem) -> tuple[bool, str]:
    """What :func:`supports` says, on the instruction sets that were measured."""
    able, why = supports(problem)
    module, _ = backend.load()
    if able and module is not None and module.isa() not in cpu.MEASURED:
        return False, f"not measured against SDPA with {module.isa()} kernels"
    return able, why


def _many(rows: int) -> bool:
    """So many rows of a key head that packing its keys pays."""
    return rows >= cpu.LEAST_ROWS


def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    sinks: Tensor | None, alibi_slopes: Tensor | None, scale: float, window: tuple[int, int],
    softcap: float, num_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, S, H, Dv] in the dtype of q, lse [B, H, S])."""
    module, _ = backend.load()
    assert module is not None
    if not _many(q.shape[1] * (q.shape[2] // k_cache.shape[2])):
        out, lse = module.attention_decode(
            q, k_cache, v_cache, cache_seqlens, block_table, sinks, alibi_slopes, scale, *window,
            softcap, num_splits,
        )  # fmt: skip
        return out, lse
    out = q.new_empty((*q.shape[:-1], v_cache.shape[-1]))
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    for b, length in enumerate(cache_seqlens.tolist()):
        k, v = (decode_reference.sequence(t, block_table, b, length) for t in (k_cache, v_cache))
        slopes = alibi_slopes
        if slopes is not None and slopes.shape[0] > 1:
            slopes = slopes[b : b + 1]
        out[b : b + 1], lse[b : b + 1] = cpu.attention_fwd(
            q[b : b + 1], k, v, sinks, None, None, None, slopes, None, scale, window, softcap, 0.0,
            True,
        )  # fmt: skip
    return out, lse
