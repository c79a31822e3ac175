"""The registered op pair of lora_linear: schema, implementation, fake. Torch only.

One pair serves the single and the grouped form (lists of one or more members that share x) and
every backend: `backend` is a schema argument and is resolved on real tensors. The pair is
deliberately not differentiable; autograd.py wraps it. Everything here is 2-D.

torch.compile makes a constant of every float argument, so a changed scaling would compile again.
`run_time_scalings`, fp64 on the CPU, takes the place of `scalings` where that matters.

What a producer or consumer has computed while X or dY was in its registers is taken as it is:
`shrunk`, S [M, sum of ranks], in the forward (the result's own S is then empty, [M, 0]), and `ds`,
dS_g = scaling_g dY_g B_g side by side, [M, sum of ranks], in the backward. Both in the dtype of x,
any strides, without dropout only.
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
from lora_kernels.ops.lora_linear import validate
from lora_kernels.ops.lora_linear.problem import LoraLinearProblem, choose_for

_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(
    "lora_linear_fwd(Tensor x, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, "
    "Tensor?[] biases, float[] scalings, float dropout_p, Tensor? seed, str backend, "
    "Tensor? run_time_scalings=None, Tensor? shrunk=None) -> (Tensor[] ys, Tensor s)"
)
_library.define(
    "lora_linear_bwd(Tensor[] dys, Tensor x, Tensor[] weights, Tensor[] lora_as, "
    "Tensor[] lora_bs, Tensor s, float[] scalings, float dropout_p, Tensor? seed, "
    "bool need_dx, bool need_da, bool need_db, str backend, "
    "Tensor? run_time_scalings=None, Tensor? ds=None) "
    "-> (Tensor dx, Tensor[] das, Tensor[] dbs)"
)


def _launcher(
    x: Tensor, weights: list[Tensor], lora_as: list[Tensor], dropout_p: float, backend: str,
    direction: str, given: bool,
) -> ModuleType:  # fmt: skip
    problem = LoraLinearProblem.of(x, weights, lora_as, dropout_p, given)
    name, _ = choose_for(problem, backend, direction)
    return _backend_module(name)


def _check_given(name: str, t: Tensor, x: Tensor, lora_as: list[Tensor], dropout_p: float) -> None:
    rank = sum(a.shape[0] for a in lora_as)
    validate.check_given(name, t, x, (x.shape[0],), rank, dropout_p)


@functools.cache
def _backend_module(name: str) -> ModuleType:
    return importlib.import_module(f"lora_kernels.ops.lora_linear.{name}")


def _fwd(
    x: Tensor,
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    biases: list[Tensor | None],
    scalings: list[float],
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    run_time_scalings: Tensor | None = None,
    shrunk: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    if shrunk is not None:
        _check_given("shrunk", shrunk, x, lora_as, dropout_p)
    if x.shape[0] == 0:
        return _fwd_fake(
            x, weights, lora_as, lora_bs, biases, scalings, dropout_p, seed, backend,
            shrunk=shrunk,
        )  # fmt: skip
    if run_time_scalings is not None:
        scalings = run_time_scalings.tolist()
    launcher = _launcher(x, weights, lora_as, dropout_p, backend, "fwd", shrunk is not None)
    with without_autocast(x.device.type):
        ys, s = launcher.lora_linear_fwd(
            x, weights, lora_as, lora_bs, biases, scalings, dropout_p, seed, shrunk
        )
    return ys, s if shrunk is None else x.new_empty(x.shape[0], 0)


def _bwd(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    s: Tensor,
    scalings: list[float],
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    backend: str,
    run_time_scalings: Tensor | None = None,
    ds: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    if ds is not None:
        _check_given("ds", ds, x, lora_as, dropout_p)
    if x.shape[0] == 0:
        return (
            torch.empty_like(x, memory_format=torch.contiguous_format)
            if need_dx
            else x.new_empty(0),
            [a.new_zeros(a.shape) for a in lora_as] if need_da else [],
            [b.new_zeros(b.shape) for b in lora_bs] if need_db else [],
        )
    if run_time_scalings is not None:
        scalings = run_time_scalings.tolist()
    launcher = _launcher(x, weights, lora_as, dropout_p, backend, "bwd", ds is not None)
    with without_autocast(x.device.type):
        return launcher.lora_linear_bwd(
            dys, x, weights, lora_as, lora_bs, s, scalings, dropout_p, seed,
            need_dx, need_da, need_db, ds,
        )  # fmt: skip


def _fwd_fake(
    x: Tensor,
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    biases: list[Tensor | None],
    scalings: list[float],
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    run_time_scalings: Tensor | None = None,
    shrunk: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    ys = [x.new_empty(x.shape[0], w.shape[0]) for w in weights]
    ranks = sum(a.shape[0] for a in lora_as) if shrunk is None else 0
    return ys, x.new_empty(x.shape[0], ranks)


def _bwd_fake(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    s: Tensor,
    scalings: list[float],
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    backend: str,
    run_time_scalings: Tensor | None = None,
    ds: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return (
        x.new_empty(x.shape) if need_dx else x.new_empty(0),
        [a.new_empty(a.shape) for a in lora_as] if need_da else [],
        [b.new_empty(b.shape) for b in lora_bs] if need_db else [],
    )


for _key in ("CPU", "CUDA"):
    _library.impl("lora_linear_fwd", _fwd, _key)
    _library.impl("lora_linear_bwd", _bwd, _key)
torch.library.register_fake("lora_kernels::lora_linear_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("lora_kernels::lora_linear_bwd", _bwd_fake, lib=_library)

_fwd_op = torch.ops.lora_kernels.lora_linear_fwd.default
_bwd_op = torch.ops.lora_kernels.lora_linear_bwd.default


def fwd(x: Tensor, *args: Any) -> tuple[list[Tensor], Tensor]:
    """The registered forward op, called directly where nothing can tell the difference."""
    return _fwd(x, *args) if unwatched(x) else _fwd_op(x, *args)


def bwd(dys: list[Tensor], x: Tensor, *args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The registered backward op, likewise."""
    return _bwd(dys, x, *args) if unwatched(x) else _bwd_op(dys, x, *args)
