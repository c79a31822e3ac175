"""Argument checks of rms_norm; every message is one line."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops.rms_norm.problem import DTYPES

_DTYPE_NAMES = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)


def _fail(message: str) -> None:
    raise InvalidArgumentError(f"rms_norm: {message}")


def check(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, lora_as: Sequence[Tensor]
) -> None:
    if isinstance(lora_as, Tensor) or not isinstance(lora_as, (list, tuple)):
        _fail(f"lora_as is a {type(lora_as).__name__}; accepted: a list or tuple of tensors")
    named = [("x", x), *((f"lora_as[{i}]", a) for i, a in enumerate(lora_as))]
    if weight is not None:
        named.insert(1, ("weight", weight))
    for name, t in named:
        if not isinstance(t, Tensor):
            _fail(f"{name} is a {type(t).__name__}; accepted: torch.Tensor")
        if t.device != x.device:
            _fail(f"{name} is on {t.device} but x is on {x.device}; move them to one device")
        if t.dtype not in DTYPES:
            _fail(f"{name} has dtype {t.dtype}; accepted: {_DTYPE_NAMES}")
    if x.dim() == 0 or x.shape[-1] == 0:
        _fail(f"x has shape {list(x.shape)}; accepted: [..., features], features >= 1")
    features = x.shape[-1]
    if weight is not None and weight.shape != (features,):
        _fail(f"weight has shape {list(weight.shape)}; accepted: [{features}], as rows of x")
    for name, a in named[len(named) - len(lora_as) :]:
        if a.dim() != 2 or a.shape[1] != features:
            _fail(f"{name} has shape {list(a.shape)}; accepted: [rank, {features}]")
    _check_number("eps", eps)
    _check_number("offset", offset)
    if eps < 0.0:
        _fail(f"eps={eps!r} is not usable; accepted: a number >= 0")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _fail(f"{name} is a {type(value).__name__}; accepted: a finite number")
    if not math.isfinite(value):
        _fail(f"{name}={value!r} is not usable; accepted: a finite number")
