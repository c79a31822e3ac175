"""Argument checks of rope; every message is one line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops.rope.problem import DTYPES

_DTYPE_NAMES = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)


def _fail(message: str) -> None:
    raise InvalidArgumentError(f"rope: {message}")


def check(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool,
    position_ids: Tensor | None,
) -> None:  # fmt: skip
    if not isinstance(interleaved, bool):
        _fail(f"interleaved={interleaved!r} is not usable; accepted: True or False")
    named: dict[str, Any] = {"q": q, "cos": cos, "sin": sin}
    optional = {"k": k, "position_ids": position_ids}
    named.update({name: t for name, t in optional.items() if t is not None})
    for name, t in named.items():
        if not isinstance(t, Tensor):
            _fail(f"{name} is a {type(t).__name__}; accepted: torch.Tensor")
        elif t.device != q.device:
            _fail(f"{name} is on {t.device} but q is on {q.device}; move them to one device")
        elif name == "position_ids":
            if t.dtype not in (torch.int32, torch.int64):
                _fail(f"position_ids has dtype {t.dtype}; accepted: int32, int64")
        elif t.dtype not in DTYPES:
            _fail(f"{name} has dtype {t.dtype}; accepted: {_DTYPE_NAMES}")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        _fail("cos or sin requires a gradient, which is not computed; detach them")
    _check_heads(q, k)
    _check_tables(q, cos, sin, position_ids)


def _check_heads(q: Tensor, k: Tensor | None) -> None:
    if q.dim() not in (3, 4):
        _fail(f"q has shape {list(q.shape)}; accepted: [B, S, H, D] or packed [T, H, D]")
    if k is None:
        return
    if k.dtype != q.dtype:
        _fail(f"k is {k.dtype} but q is {q.dtype}; convert one of them")
    if k.dim() != q.dim() or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        _fail(
            f"k has shape {list(k.shape)}; accepted: {[*q.shape[:-2], 'Hk', q.shape[-1]]}, as q "
            "but for the number of heads"
        )


def _check_tables(q: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> None:
    if cos.shape != sin.shape:
        _fail(f"sin has shape {list(sin.shape)}; accepted: {list(cos.shape)}, as cos")
    rotated = cos.shape[-1] if cos.dim() else 0
    if rotated < 2 or rotated % 2 or rotated > q.shape[-1]:
        _fail(
            f"cos has shape {list(cos.shape)}; accepted: an even number of channels from 2 to "
            f"{q.shape[-1]}, the size of a head"
        )
    lead = list(q.shape[:-2])  # [B, S] or [T]
    allowed = [lead[-1:]]
    if len(lead) == 2:
        allowed += [lead, [1, lead[1]]]
    if position_ids is None:
        if list(cos.shape[:-1]) not in allowed:
            _fail(
                f"cos has shape {list(cos.shape)}; accepted: {_either(allowed)} rows of {rotated}, "
                "one per position of q, or a cache and position_ids"
            )
        return
    if cos.dim() != 2:
        _fail(f"cos has shape {list(cos.shape)}; accepted with position_ids: [positions, R]")
    if list(position_ids.shape) not in allowed:
        _fail(f"position_ids has shape {list(position_ids.shape)}; accepted: {_either(allowed)}")


def _either(shapes: list[list[int]]) -> str:
    return " or ".join(str(shape) for shape in shapes)


def check_values(position_ids: Tensor | None, positions: int) -> None:
    """On the CPU, where looking costs nothing; a GPU's gather asserts on the device."""
    if position_ids is None or position_ids.device.type != "cpu" or position_ids.numel() == 0:
        return
    low, high = (int(t) for t in position_ids.aminmax())
    if low < 0 or high >= positions:
        wrong = low if low < 0 else high
        _fail(f"position_ids holds {wrong}; accepted: 0 to {positions - 1}, the rows of cos")
