"""The registered op pair of rms_norm: schema, implementation, fake. Torch only.

Deliberately not differentiable; autograd.py wraps it. Everything here is 2-D: x [M, K], A [r, K].
S of all A side by side is [M, 0] without any; dweight is empty where it is not needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops._eager import unwatched
from lora_kernels.ops.rms_norm.problem import RmsNormProblem, launcher

_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(
    "rms_norm_fwd(Tensor x, Tensor? weight, Tensor[] lora_as, float eps, float offset, "
    "str backend) -> (Tensor y, Tensor rstd, Tensor s)"
)
_library.define(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, float offset, "
    "bool need_dweight, str backend) -> (Tensor dx, Tensor dweight)"
)


def _fwd(
    x: Tensor, weight: Tensor | None, lora_as: list[Tensor], eps: float, offset: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if x.shape[0] == 0:
        return _fwd_fake(x, weight, lora_as, eps, offset, backend)
    module = launcher(RmsNormProblem.of(x, weight, lora_as), backend, "fwd")
    with without_autocast(x.device.type):
        y, rstd, s = module.rms_norm_fwd(x, weight, lora_as, eps, offset)
    return y.contiguous(), rstd.contiguous(), s.contiguous()


def _bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, need_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if x.shape[0] == 0:
        dx, dweight = _bwd_fake(dy, x, weight, rstd, offset, need_dweight, backend)
        return dx, dweight.zero_()
    module = launcher(RmsNormProblem.of(x, weight, ()), backend, "bwd")
    dx, dweight = module.rms_norm_bwd(dy, x, weight, rstd, offset, need_dweight)
    return dx.contiguous(), x.new_empty(0) if dweight is None else dweight.contiguous()


def _fwd_fake(
    x: Tensor, weight: Tensor | None, lora_as: list[Tensor], eps: float, offset: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rank = sum(a.shape[0] for a in lora_as)
    rows = x.shape[0]
    return x.new_empty(x.shape), x.new_empty(rows, dtype=wide), x.new_empty(rows, rank)


def _bwd_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, need_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx = x.new_empty(x.shape)
    if weight is None or not need_dweight:
        return dx, x.new_empty(0)
    return dx, weight.new_empty(weight.shape)


for _key in ("CPU", "CUDA"):
    _library.impl("rms_norm_fwd", _fwd, _key)
    _library.impl("rms_norm_bwd", _bwd, _key)
torch.library.register_fake("lora_kernels::rms_norm_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("lora_kernels::rms_norm_bwd", _bwd_fake, lib=_library)

_fwd_op = torch.ops.lora_kernels.rms_norm_fwd.default
_bwd_op = torch.ops.lora_kernels.rms_norm_bwd.default


def fwd(
    x: Tensor, weight: Tensor | None, lora_as: list[Tensor], eps: float, offset: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered forward op, called directly where nothing can tell the difference."""
    run = _fwd if unwatched(x) else _fwd_op
    return run(x, weight, lora_as, eps, offset, backend)


def bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, need_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The registered backward op, likewise."""
    run = _bwd if unwatched(dy, x) else _bwd_op
    return run(dy, x, weight, rstd, offset, need_dweight, backend)
