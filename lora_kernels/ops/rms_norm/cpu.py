"""rms_norm on the compiled CPU library (csrc/rms_norm): a row is read once and stays in the cache
until it is written."""

from __future__ import annotations

from torch import Tensor

from lora_kernels._backends import cpu as backend
from lora_kernels.ops.rms_norm.problem import RmsNormProblem


def supports(problem: RmsNormProblem) -> tuple[bool, str]:
    why = backend.lacking("rms_norm_bwd", "rms_norm", "x", problem.device, problem.dtype)
    if why:
        return False, why
    return True, "one pass over the rows"


def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, lora_as: list[Tensor], eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Y [M, K] in the dtype of x, rstd [M] in fp32, S [M, sum of ranks] in the dtype of x."""
    module, _ = backend.load()
    assert module is not None
    y, rstd, s = module.rms_norm_fwd(x, weight, lora_as, eps, offset)
    return y, rstd, s


def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, need_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """dX [M, K] in the dtype of x; dW [K] in that of weight, None where it is not needed."""
    module, _ = backend.load()
    assert module is not None
    needed = need_dweight and weight is not None
    dx, dweight = module.rms_norm_bwd(dy, x, weight, rstd, offset, needed)
    return dx, dweight if needed else None
