"""Argument checks of attention; every message is one line."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops.attention.problem import DTYPES

_DTYPE_NAMES = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)


def _fail(message: str) -> None:
    raise InvalidArgumentError(f"attention: {message}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_options(
    causal: bool, scale: float | None, window: tuple[int, int] | None, softcap: float | None,
    dropout_p: float, return_lse: bool, deterministic: bool,
) -> None:  # fmt: skip
    flags = {"causal": causal, "return_lse": return_lse, "deterministic": deterministic}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            _fail(f"{name}={flag!r} is a {type(flag).__name__}; accepted: True or False")
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            _fail(f"window={window!r} is not a pair; accepted: (left, right), -1 for unlimited")
        for side in window:
            if not torch.compiler.is_compiling() and (not _is_int(side) or side < -1):
                _fail(f"window={window!r} holds {side!r}; accepted: ints from -1 (unlimited)")
    if torch.compiler.is_compiling():
        return  # a traced float has no value yet
    if scale is not None and (not isinstance(scale, (int, float)) or not math.isfinite(scale)):
        _fail(f"scale={scale!r} is not usable; accepted: a finite number, or None")
    if softcap is not None and (
        not isinstance(softcap, (int, float)) or not math.isfinite(softcap) or softcap <= 0.0
    ):
        _fail(f"softcap={softcap!r} is not usable; accepted: a number above 0, or None")
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0:
        _fail(f"dropout_p={dropout_p!r} is not a probability; accepted: 0 to 1")


def check_tensors(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, attn_mask: Tensor | None,
    alibi_slopes: Tensor | None, autocast: bool,
) -> None:  # fmt: skip
    needed: dict[str, Any] = {"q": q, "k": k, "v": v}
    optional = {"sinks": sinks, "attn_mask": attn_mask, "alibi_slopes": alibi_slopes}
    given = {name: t for name, t in optional.items() if t is not None}
    for name, t in {**needed, **given}.items():
        if not isinstance(t, Tensor):
            _fail(f"{name} is a {type(t).__name__}; accepted: torch.Tensor")
        elif t.device != q.device:
            _fail(f"{name} is on {t.device} but q is on {q.device}; move them to one device")
        elif t.dtype not in DTYPES and not (name == "attn_mask" and t.dtype == torch.bool):
            also = ", bool" if name == "attn_mask" else ""
            _fail(f"{name} has dtype {t.dtype}; accepted: {_DTYPE_NAMES}{also}")
        elif name in needed and t.dtype != q.dtype and not autocast:
            _fail(
                f"{name} is {t.dtype} but q is {q.dtype}; convert one of them or use torch.autocast"
            )
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        _fail("alibi_slopes requires a gradient, which is not computed; detach it")


def check_packing(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> None:  # fmt: skip
    packed = cu_seqlens is not None
    if cu_seqlens is None and cu_seqlens_k is not None:
        _fail("cu_seqlens_k is given without cu_seqlens; give both, or neither")
    if packed and attn_mask is not None:
        _fail("attn_mask cannot be used with cu_seqlens; leave one of them out")
    for name, t in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if t is None:
            continue
        if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
            what = t.dtype if isinstance(t, Tensor) else type(t).__name__
            _fail(f"{name} is {what}; accepted: an int32 or int64 tensor")
        if t.dim() != 1 or t.shape[0] < 2:
            _fail(f"{name} has shape {list(t.shape)}; accepted: [sequences + 1], at least [2]")
        if t.device != q.device:
            _fail(f"{name} is on {t.device} but q is on {q.device}; move them to one device")
    form = "[T, H, D]" if packed else "[B, S, H, D]"
    if q.dim() != (3 if packed else 4):
        hint = "" if packed or q.dim() != 3 else "; a packed q needs cu_seqlens"
        _fail(f"q has shape {list(q.shape)}; accepted: {form}{hint}")
    if cu_seqlens is not None and cu_seqlens_k is not None:
        if cu_seqlens.shape != cu_seqlens_k.shape:
            _fail(
                f"cu_seqlens_k has shape {list(cu_seqlens_k.shape)}; accepted: "
                f"{list(cu_seqlens.shape)}, as cu_seqlens"
            )
    elif packed and k.dim() == 3 and k.shape[0] != q.shape[0]:
        _fail(
            f"k has {k.shape[0]} rows and q {q.shape[0]}; give cu_seqlens_k where they differ"
        )  # fmt: skip


def check_boundaries(cu_seqlens: Tensor, rows: int, name: str) -> None:
    """The values, which only the operator itself sees when it was compiled."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != rows or ends != sorted(ends):
        shown = str(ends) if len(ends) <= 8 else f"[{ends[0]}, ..., {ends[-1]}]"
        _fail(
            f"{name} is {shown}; accepted: from 0, never falling, to {rows}, the rows of the "
            "packed tensor"
        )


def check_biases(
    q: Tensor, k: Tensor, v: Tensor, batch: int, sinks: Tensor | None, attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
) -> None:  # fmt: skip
    heads, lead = q.shape[-2], list(q.shape[:-3])
    if heads < 1 or q.shape[-1] < 1:
        _fail(f"q has shape {list(q.shape)}; accepted: at least one head of size 1")
    if k.dim() != q.dim() or list(k.shape[:-3]) != lead or k.shape[-1] != q.shape[-1]:
        _fail(
            f"k has shape {list(k.shape)}; accepted: {[*lead, 'Sk', 'Hk', q.shape[-1]]}, "
            "as q but for the number of keys and heads"
        )
    if k.shape[-2] < 1 or heads % k.shape[-2] != 0:
        _fail(f"k has {k.shape[-2]} heads; accepted: a divisor of the {heads} heads of q")
    if v.dim() != k.dim() or v.shape[:-1] != k.shape[:-1] or v.shape[-1] < 1:
        _fail(f"v has shape {list(v.shape)}; accepted: {[*k.shape[:-1], 'Dv >= 1']}, as k")
    if sinks is not None and tuple(sinks.shape) != (heads,):
        _fail(f"sinks has shape {list(sinks.shape)}; accepted: [{heads}], one per head of q")
    if alibi_slopes is not None and tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
        _fail(
            f"alibi_slopes has shape {list(alibi_slopes.shape)}; accepted: [{heads}] or "
            f"[{batch}, {heads}]"
        )
    if attn_mask is not None:
        full = (batch, heads, q.shape[1], k.shape[1])
        given = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
        fits = len(given) == 4 and all(g in (1, f) for g, f in zip(given, full, strict=True))
        if not fits:
            _fail(
                f"attn_mask has shape {list(attn_mask.shape)}; accepted: broadcastable to "
                f"{list(full)} (batch, heads, queries, keys)"
            )


def make_seed(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """The dropout seed as an int64 tensor on `device`; drawn from torch's generator when None."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            _fail(
                f"seed is a {seed.dtype} tensor of {seed.numel()} elements; "
                "accepted: an int or an int64 tensor of one element"
            )
    elif seed is not None and not _is_int(seed):
        _fail(f"seed={seed!r} is a {type(seed).__name__}; accepted: an int or an int64 tensor")
    elif seed is not None and not 0 <= seed < 2**63:
        _fail(f"seed={seed} is out of range; accepted: 0 to 2**63 - 1")
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(0, 2**62, (), device=device, dtype=torch.int64)
    if isinstance(seed, Tensor):
        return seed.detach().reshape(()).to(device)
    return torch.tensor(seed, device=device, dtype=torch.int64)
