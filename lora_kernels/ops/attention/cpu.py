"""attention on the compiled CPU library (csrc/attention): both directions in blocks of queries x
keys, packed sequences, windows and masks in place, no scores in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels._backends import cpu as backend
from lora_kernels.ops.attention import capabilities
from lora_kernels.ops.attention.operands import sink_gradient
from lora_kernels.ops.attention.problem import AttentionProblem

_EVEN = frozenset({"float32", "gqa", "sinks", "bool_mask", "additive_mask"})
MEASURED = ("amx", "avx512")
LEAST_ROWS = 32  # below, packing the keys costs more than it saves


def supports(problem: AttentionProblem) -> tuple[bool, str]:
    why = backend.lacking("attention_bwd", "attention", "q", problem.device)
    if why:
        return False, why
    lacking = capabilities.lacking("cpu", problem.features())
    if lacking:
        return False, lacking
    module, _ = backend.load()
    assert module is not None
    return True, f"{module.attention_engine(problem.dtype)} kernels"


def outruns_aten(problem: AttentionProblem) -> tuple[bool, str]:
    """What :func:`supports` says, less the problems where `aten` was not measured to be slower."""
    able, why = supports(problem)
    if not able:
        return able, why
    module, _ = backend.load()
    assert module is not None
    if module.isa() not in MEASURED:
        return False, f"not measured against SDPA with {module.isa()} kernels"
    if problem.S * (problem.H // problem.Hk) < LEAST_ROWS:
        return False, f"fewer than {LEAST_ROWS} rows share a key head: SDPA reads the keys once"
    if problem.dtype == torch.float32 and problem.features() <= _EVEN:
        return False, "in fp32, with nothing to leave out, SDPA's products are as quick"
    return True, why


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, attn_mask: Tensor | None,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, alibi_slopes: Tensor | None,
    seed: Tensor | None, scale: float, window: tuple[int, int], softcap: float, dropout_p: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse); a task owns what it writes, so `deterministic` asks for nothing more."""
    module, _ = backend.load()
    assert module is not None
    out, lse = module.attention_fwd(
        q, k, v, sinks, attn_mask, cu_seqlens, cu_seqlens_k, alibi_slopes, seed, scale, *window,
        softcap, dropout_p,
    )  # fmt: skip
    return out, lse


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    sinks: Tensor | None, attn_mask: Tensor | None, cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None, alibi_slopes: Tensor | None, seed: Tensor | None, scale: float,
    window: tuple[int, int], softcap: float, dropout_p: float, deterministic: bool,
    needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, sinks and attn_mask, the last two in fp32; None where `needs` does
    not ask."""
    module, _ = backend.load()
    assert module is not None
    of_mask = needs[4] and attn_mask is not None
    *grads, delta, dmask = module.attention_bwd(
        dout, dlse, out, lse, q, k, v, attn_mask, cu_seqlens, cu_seqlens_k, alibi_slopes, seed,
        scale, *window, softcap, dropout_p, *needs[:3], of_mask,
    )  # fmt: skip
    dsinks = None
    if needs[3] and sinks is not None:
        batched = (t if t.dim() == 3 else t.unsqueeze(0) for t in (lse, delta))
        dsinks = sink_gradient(sinks, *batched)
    return [*grads, dsinks, dmask if of_mask else None]
