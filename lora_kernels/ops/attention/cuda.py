"""attention on the CUDA C++ kernels of csrc/attention/cuda (library lora_kernels/_cuda.so).

Forward and backward run mma.sync kernels on compute capability 8.0 and newer; on 9.0 wgmma kernels
where there is no softcap, ALiBi or dropout. Others by name, for tuners and tests:
LORA_KERNELS_CUDA_ATTENTION, one of KERNELS.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from lora_kernels._backends import cuda as backend
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops._philox import keep_scale, threshold
from lora_kernels.ops.attention import capabilities
from lora_kernels.ops.attention.problem import AttentionProblem

KERNELS = ("auto", "sm80", "sm90")
_MAX_EXTENT, _MAX_HEADS = 2**30, 65535


def supports(problem: AttentionProblem) -> tuple[bool, str]:
    """Can the kernels run `problem`, at whatever speed; the reason is for people."""
    if problem.device != "cuda":
        return False, f"q is on {problem.device}, the kernels work on cuda tensors"
    lacking = capabilities.lacking("cuda", problem.features())
    if lacking:
        return False, lacking
    if max(problem.B, problem.S, problem.Sk) > _MAX_EXTENT:
        return False, f"an extent is larger than {_MAX_EXTENT}"
    if problem.H > _MAX_HEADS:
        return False, f"{problem.H} heads are too many; at most {_MAX_HEADS}"
    reason = backend.device_reason()
    return not reason, reason or f"CUDA C++ kernels, {_kernels_of(problem)}"


def _kernels_of(problem: AttentionProblem) -> str:
    """Which ones run where the tensors can be described to the copy engine, and why no others."""
    if _kernel() != "auto":
        return f"{_kernel()} by LORA_KERNELS_CUDA_ATTENTION"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"sm_80 (compute capability {major}.{minor}; those of sm_90a need 9.0)"
    if problem.softcap or problem.alibi or problem.dropout_p:
        return "sm_80 (softcap, ALiBi and dropout are not in those of sm_90a)"
    return "sm_90a"


def _kernel() -> str:
    name = os.environ.get("LORA_KERNELS_CUDA_ATTENTION", "") or "auto"
    if name not in KERNELS:
        raise InvalidArgumentError(
            f"LORA_KERNELS_CUDA_ATTENTION={name!r} is unknown; accepted: {', '.join(KERNELS)}"
        )
    return name


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().to(torch.float32).contiguous()


def _ends(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.int32).contiguous()


def _shared(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None, alibi_slopes: Tensor | None, seed: Tensor | None, scale: float,
    window: tuple[int, int], softcap: float, dropout_p: float,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments that forward and backward have in common."""
    drops = dropout_p != 0.0 and seed is not None
    return (
        q, k, v, _float(sinks), _ends(cu_seqlens), _ends(cu_seqlens_k), _float(alibi_slopes),
        seed if drops else None, scale, *window, softcap,
        keep_scale(dropout_p) if drops else 1.0, threshold(dropout_p) if drops else 0,
    )  # fmt: skip


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, attn_mask: Tensor | None,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, alibi_slopes: Tensor | None,
    seed: Tensor | None, scale: float, window: tuple[int, int], softcap: float, dropout_p: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse); the sums have one order, so `deterministic` asks for nothing more."""
    library, reason = backend.load()
    assert library is not None, reason
    assert attn_mask is None, "refused by supports()"
    shared = _shared(
        q, k, v, sinks, cu_seqlens, cu_seqlens_k, alibi_slopes, seed, scale, window, softcap,
        dropout_p,
    )  # fmt: skip
    return library.attention_fwd(*shared, _kernel())


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    sinks: Tensor | None, attn_mask: Tensor | None, cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None, alibi_slopes: Tensor | None, seed: Tensor | None, scale: float,
    window: tuple[int, int], softcap: float, dropout_p: float, deterministic: bool,
    needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, sinks (fp32) and attn_mask; None where `needs` does not ask."""
    library, reason = backend.load()
    assert library is not None, reason
    shared = _shared(
        q, k, v, sinks, cu_seqlens, cu_seqlens_k, alibi_slopes, seed, scale, window, softcap,
        dropout_p,
    )  # fmt: skip
    need_dkv, need_dsinks = needs[1] or needs[2], needs[3] and sinks is not None
    dq, dk, dv, dsinks = library.attention_bwd(
        dout,
        _float(dlse),
        out,
        lse.contiguous(),
        *shared,
        needs[0],
        need_dkv,
        need_dsinks,
        _kernel(),
    )
    grads = (dq, dk, dv, dsinks)
    return [*(g if need else None for g, need in zip(grads, needs, strict=False)), None]
