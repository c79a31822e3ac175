"""Argument checks of gated_activation; every message is one line."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops.gated_activation.problem import DTYPES, KINDS

_DTYPE_NAMES = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)


def _fail(message: str) -> None:
    raise InvalidArgumentError(f"gated_activation: {message}")


def check(gate: Tensor, up: Tensor | None, kind: str, lora_as: Sequence[Tensor] = ()) -> None:
    if not isinstance(lora_as, (tuple, list)):
        _fail(f"lora_as is a {type(lora_as).__name__}; accepted: a tuple or list of tensors")
    adapters = [(f"lora_as[{g}]", a) for g, a in enumerate(lora_as)]
    for name, t in (("gate", gate), ("up", up), *adapters):
        if name == "up" and t is None:
            continue
        if not isinstance(t, Tensor):
            _fail(f"{name} is a {type(t).__name__}; accepted: torch.Tensor")
            continue
        if t.device != gate.device:
            _fail(f"{name} is on {t.device} but gate is on {gate.device}; move them to one device")
        if t.dtype not in DTYPES:
            _fail(f"{name} has dtype {t.dtype}; accepted: {_DTYPE_NAMES}")
    if up is not None and up.dtype != gate.dtype:
        _fail(f"up is {up.dtype} but gate is {gate.dtype}; convert one of them")
    if gate.dim() == 0:
        _fail("gate is a scalar; accepted: [..., features]")
    if up is not None and up.shape != gate.shape:
        _fail(f"up has shape {list(up.shape)}; accepted: {list(gate.shape)}, as gate")
    for name, a in adapters:
        if a.dim() != 2 or a.shape[1] != gate.shape[-1] or a.shape[0] < 1:
            _fail(f"{name} has shape {list(a.shape)}; accepted: [r >= 1, {gate.shape[-1]}]")
    if kind not in KINDS:
        _fail(f"kind={kind!r} is not usable; accepted: {', '.join(KINDS)}")
