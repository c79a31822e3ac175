"""The registered op pair of attention: schema, implementation, fake. Torch only.

Deliberately not differentiable; autograd.py wraps it. q, k, v are [B, S, heads, D], or with
cu_seqlens packed [T, heads, D]; cu_seqlens_k None is cu_seqlens. `window` has causal folded in;
softcap 0 is none; the mask is 4-D and the slopes are 2-D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops._eager import unwatched
from lora_kernels.ops.attention import validate
from lora_kernels.ops.attention.problem import AttentionProblem, launcher

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? attn_mask, Tensor? cu_seqlens, "
    "Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? seed, float scale, int[] window, "
    "float softcap, float dropout_p, bool deterministic"
)
_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(f"attention_fwd({_ARGUMENTS}, str backend) -> (Tensor out, Tensor lse)")
_library.define(
    f"attention_bwd(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_ARGUMENTS}, "
    "bool[] needs, str backend) -> Tensor[]"
)


def problem(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, attn_mask: Tensor | None,
    cu_seqlens: Tensor | None, alibi_slopes: Tensor | None, window: tuple[int, int],
    softcap: float, dropout_p: float, deterministic: bool = True,
) -> AttentionProblem:  # fmt: skip
    mask = ""
    if attn_mask is not None:
        mask = "bool" if attn_mask.dtype == torch.bool else "additive"
    packed = cu_seqlens is not None
    return AttentionProblem(
        B=cu_seqlens.shape[0] - 1 if cu_seqlens is not None else q.shape[0],
        S=q.shape[-3], H=q.shape[-2], D=q.shape[-1],
        Sk=k.shape[-3], Hk=k.shape[-2], Dv=v.shape[-1],
        window=window, softcap=softcap, sinks=sinks is not None, mask=mask,
        alibi=alibi_slopes is not None, varlen=packed, dropout_p=dropout_p, dtype=q.dtype,
        device=q.device.type, deterministic=deterministic,
    )  # fmt: skip


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _fwd(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, attn_mask: Tensor | None,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, alibi_slopes: Tensor | None,
    seed: Tensor | None, scale: float, window: list[int], softcap: float, dropout_p: float,
    deterministic: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if cu_seqlens is not None:
        validate.check_boundaries(cu_seqlens, q.shape[0], "cu_seqlens")
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    else:
        validate.check_boundaries(cu_seqlens_k, k.shape[0], "cu_seqlens_k")
    reach = (window[0], window[1])
    p = problem(
        q, k, v, sinks, attn_mask, cu_seqlens, alibi_slopes, reach, softcap, dropout_p,
        deterministic,
    )  # fmt: skip
    with without_autocast(q.device.type):
        return launcher(p, backend, "fwd").attention_fwd(
            q, k, v, sinks, attn_mask, cu_seqlens, cu_seqlens_k, alibi_slopes, seed, scale,
            reach, softcap, dropout_p, deterministic,
        )  # fmt: skip


def _bwd(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    sinks: Tensor | None, attn_mask: Tensor | None, cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None, alibi_slopes: Tensor | None, seed: Tensor | None, scale: float,
    window: list[int], softcap: float, dropout_p: float, deterministic: bool, needs: list[bool],
    backend: str,
) -> list[Tensor]:  # fmt: skip
    reach = (window[0], window[1])
    p = problem(
        q, k, v, sinks, attn_mask, cu_seqlens, alibi_slopes, reach, softcap, dropout_p,
        deterministic,
    )  # fmt: skip
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    with without_autocast(q.device.type):
        grads = launcher(p, backend, "bwd").attention_bwd(
            dout, dlse, out, lse, q, k, v, sinks, attn_mask, cu_seqlens, cu_seqlens_k,
            alibi_slopes, seed, scale, reach, softcap, dropout_p, deterministic, needs,
        )  # fmt: skip
    owners = (q, k, v, sinks, attn_mask)
    return [
        g.to(owner.dtype).contiguous()
        if need and owner is not None and g is not None
        else q.new_empty(0)
        for g, owner, need in zip(grads, owners, needs, strict=True)
    ]


def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, attn_mask: Tensor | None,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, alibi_slopes: Tensor | None,
    seed: Tensor | None, scale: float, window: list[int], softcap: float, dropout_p: float,
    deterministic: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(_lse_shape(q), dtype=_wide(q))


def _bwd_fake(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    sinks: Tensor | None, attn_mask: Tensor | None, cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None, alibi_slopes: Tensor | None, seed: Tensor | None, scale: float,
    window: list[int], softcap: float, dropout_p: float, deterministic: bool, needs: list[bool],
    backend: str,
) -> list[Tensor]:  # fmt: skip
    return [
        owner.new_empty(owner.shape) if need and owner is not None else q.new_empty(0)
        for owner, need in zip((q, k, v, sinks, attn_mask), needs, strict=True)
    ]


for _key in ("CPU", "CUDA"):
    _library.impl("attention_fwd", _fwd, _key)
    _library.impl("attention_bwd", _bwd, _key)
torch.library.register_fake("lora_kernels::attention_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("lora_kernels::attention_bwd", _bwd_fake, lib=_library)

_fwd_op = torch.ops.lora_kernels.attention_fwd.default
_bwd_op = torch.ops.lora_kernels.attention_bwd.default


def fwd(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The registered forward op, called directly where nothing can tell the difference."""
    return _fwd(q, *args) if unwatched(q) else _fwd_op(q, *args)


def bwd(dout: Tensor, *args: Any) -> list[Tensor]:
    """The registered backward op, likewise."""
    return _bwd(dout, *args) if unwatched(dout) else _bwd_op(dout, *args)
