"""The registered op pair of dora_linear: schema, implementation, fake. Torch only; all 2-D.

The pair is deliberately not differentiable; autograd.py wraps it.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops.dora_linear.problem import DoraLinearProblem, choose, inner_backend

_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(
    "dora_linear_fwd(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor magnitude, "
    "Tensor? bias, float scaling, float dropout_p, Tensor? seed, bool keep, str backend) "
    "-> (Tensor y, Tensor p, Tensor s, Tensor norm)"
)
_library.define(
    "dora_linear_bwd(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, "
    "Tensor magnitude, Tensor p, Tensor s, Tensor norm, float scaling, float dropout_p, "
    "Tensor? seed, bool need_dx, bool need_dw, bool need_da, bool need_db, bool need_dm, "
    "str backend) -> (Tensor dx, Tensor dw, Tensor da, Tensor db, Tensor dm)"
)


def _launcher(x: Tensor, weight: Tensor, lora_a: Tensor, dropout_p: float, backend: str) -> Any:
    problem = DoraLinearProblem(
        len(x), x.shape[1], len(weight), len(lora_a), x.dtype, x.device.type, dropout_p
    )
    name, _ = choose(problem, None if backend == "auto" else backend)
    return importlib.import_module(f"lora_kernels.ops.dora_linear.{name}")


def _norm_dtype(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> torch.dtype:
    adapter = torch.promote_types(lora_a.dtype, lora_b.dtype)
    return torch.promote_types(torch.promote_types(weight.dtype, adapter), torch.float32)


def _fwd(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    launcher = _launcher(x, weight, lora_a, dropout_p, backend)
    with without_autocast(x.device.type):
        y, p, s, norm = launcher.dora_linear_fwd(
            x, weight, lora_a, lora_b, magnitude, bias, scaling, dropout_p, seed, keep,
            inner_backend(None if backend == "auto" else backend),
        )  # fmt: skip
    return y, p, s, norm.to(_norm_dtype(weight, lora_a, lora_b))


def _bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    p: Tensor,
    s: Tensor,
    norm: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dw: bool,
    need_da: bool,
    need_db: bool,
    need_dm: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    launcher = _launcher(x, weight, lora_a, dropout_p, backend)
    with without_autocast(x.device.type):
        return launcher.dora_linear_bwd(
            dy, x, weight, lora_a, lora_b, magnitude, p, s, norm, scaling, dropout_p, seed,
            need_dx, need_dw, need_da, need_db, need_dm,
            inner_backend(None if backend == "auto" else backend),
        )  # fmt: skip


def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return (
        x.new_empty(shape),
        x.new_empty(shape) if keep else x.new_empty(0),
        x.new_empty(x.shape[0], lora_a.shape[0]),
        x.new_empty(weight.shape[0], dtype=_norm_dtype(weight, lora_a, lora_b)),
    )


def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    p: Tensor,
    s: Tensor,
    norm: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dw: bool,
    need_da: bool,
    need_db: bool,
    need_dm: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needed = (need_dx, need_dw, need_da, need_db, need_dm)
    like = (x, weight, lora_a, lora_b, magnitude)
    made = [
        t.new_empty(t.shape) if need else x.new_empty(0)
        for t, need in zip(like, needed, strict=True)
    ]
    return made[0], made[1], made[2], made[3], made[4]


for _key in ("CPU", "CUDA"):
    _library.impl("dora_linear_fwd", _fwd, _key)
    _library.impl("dora_linear_bwd", _bwd, _key)
torch.library.register_fake("lora_kernels::dora_linear_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("lora_kernels::dora_linear_bwd", _bwd_fake, lib=_library)

fwd = torch.ops.lora_kernels.dora_linear_fwd.default
bwd = torch.ops.lora_kernels.dora_linear_bwd.default
