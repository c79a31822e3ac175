"""The registered ops of quant_linear: schema, implementation, fake. Torch only.

A quantized weight crosses the boundary as the list of its parts and the text of its spec
(formats.py), so one schema serves every format, and a graph that was compiled for one layer serves
every layer of the same spec. One pair serves the plain layer and the one with an adapter, and every
backend: `backend` is resolved on real tensors. Not differentiable; autograd.py wraps it. 2-D.

torch.compile makes a constant of every float argument, so a changed scaling would compile again.
`run_time_scaling`, fp64 on the CPU, takes the place of `scaling` where that matters.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops._eager import unwatched
from lora_kernels.ops.quant_linear.formats import from_key
from lora_kernels.ops.quant_linear.problem import QuantLinearProblem, choose

_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(
    "quant_dequantize(Tensor[] parts, str spec, ScalarType dtype, str backend) -> Tensor"
)
_library.define(
    "quant_linear_fwd(Tensor x, Tensor[] parts, str spec, Tensor? bias, Tensor? lora_a, "
    "Tensor? lora_b, float scaling, float dropout_p, Tensor? seed, str backend, "
    "Tensor? run_time_scaling=None) -> (Tensor y, Tensor s)"
)
_library.define(
    "quant_linear_bwd(Tensor dy, Tensor? x, Tensor[] parts, str spec, Tensor? lora_a, "
    "Tensor? lora_b, Tensor s, float scaling, float dropout_p, Tensor? seed, bool need_dx, "
    "bool need_da, bool need_db, str backend, Tensor? run_time_scaling=None) "
    "-> (Tensor dx, Tensor da, Tensor db)"
)


@functools.cache
def _backend_module(name: str) -> ModuleType:
    return importlib.import_module(f"lora_kernels.ops.quant_linear.{name}")


def _dequantize(parts: list[Tensor], spec: str, dtype: torch.dtype, backend: str) -> Tensor:
    parsed = from_key(spec)
    device = parts[0].device.type
    name, _ = choose(QuantLinearProblem.of_dequantize(parsed, dtype, device), backend)
    with without_autocast(device):
        return _backend_module(name).dequantize(tuple(parts), parsed, dtype)


def _dequantize_fake(parts: list[Tensor], spec: str, dtype: torch.dtype, backend: str) -> Tensor:
    return parts[0].new_empty(from_key(spec).shape, dtype=dtype)


def _fwd(
    x: Tensor,
    parts: list[Tensor],
    spec: str,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    run_time_scaling: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if x.shape[0] == 0:
        return _fwd_fake(x, parts, spec, bias, lora_a, lora_b, scaling, dropout_p, seed, backend)
    if run_time_scaling is not None:
        scaling = run_time_scaling.item()
    parsed = from_key(spec)
    name, _ = choose(QuantLinearProblem.of(x, parsed, lora_a, dropout_p), backend)
    with without_autocast(x.device.type):
        return _backend_module(name).quant_linear_fwd(
            x, tuple(parts), parsed, bias, lora_a, lora_b, scaling, dropout_p, seed
        )


def _fwd_fake(
    x: Tensor,
    parts: list[Tensor],
    spec: str,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    run_time_scaling: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rank = 0 if lora_a is None else lora_a.shape[0]
    return x.new_empty(x.shape[0], from_key(spec).rows), x.new_empty(x.shape[0], rank)


def _bwd(
    dy: Tensor,
    x: Tensor | None,
    parts: list[Tensor],
    spec: str,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    backend: str,
    run_time_scaling: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if dy.shape[0] == 0:
        dx, da, db = _bwd_fake(
            dy, x, parts, spec, lora_a, lora_b, s, scaling, dropout_p, seed, need_dx, need_da,
            need_db, backend,
        )  # fmt: skip
        return dx, da.zero_(), db.zero_()
    if run_time_scaling is not None:
        scaling = run_time_scaling.item()
    parsed = from_key(spec)
    name, _ = choose(QuantLinearProblem.of(dy, parsed, lora_a, dropout_p), backend, "bwd")
    with without_autocast(dy.device.type):
        return _backend_module(name).quant_linear_bwd(
            dy, x, tuple(parts), parsed, lora_a, lora_b, s, scaling, dropout_p, seed,
            need_dx, need_da, need_db,
        )  # fmt: skip


def _bwd_fake(
    dy: Tensor,
    x: Tensor | None,
    parts: list[Tensor],
    spec: str,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    backend: str,
    run_time_scaling: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    def like(t: Tensor | None, needed: bool) -> Tensor:
        return t.new_empty(t.shape) if needed and t is not None else dy.new_empty(0)

    dx = dy.new_empty(dy.shape[0], from_key(spec).columns) if need_dx else dy.new_empty(0)
    return dx, like(lora_a, need_da), like(lora_b, need_db)


for _key in ("CPU", "CUDA"):
    _library.impl("quant_dequantize", _dequantize, _key)
    _library.impl("quant_linear_fwd", _fwd, _key)
    _library.impl("quant_linear_bwd", _bwd, _key)
torch.library.register_fake("lora_kernels::quant_dequantize", _dequantize_fake, lib=_library)
torch.library.register_fake("lora_kernels::quant_linear_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("lora_kernels::quant_linear_bwd", _bwd_fake, lib=_library)

_dequantize_op = torch.ops.lora_kernels.quant_dequantize.default
_fwd_op = torch.ops.lora_kernels.quant_linear_fwd.default
_bwd_op = torch.ops.lora_kernels.quant_linear_bwd.default


def dequantize(parts: list[Tensor], spec: str, dtype: torch.dtype, backend: str) -> Tensor:
    """The registered op, called directly where nothing can tell the difference."""
    op = _dequantize if unwatched(parts[0]) else _dequantize_op
    return op(parts, spec, dtype, backend)


def fwd(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The registered forward op, likewise."""
    return _fwd(x, *args) if unwatched(x) else _fwd_op(x, *args)


def bwd(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The registered backward op, likewise."""
    return _bwd(dy, *args) if unwatched(dy) else _bwd_op(dy, *args)
