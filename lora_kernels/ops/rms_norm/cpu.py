"""rms_norm on the compiled CPU library (csrc/rms_norm): a row is read once and stays in the cache
until it is written."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels._backends import cpu as backend
from lora_kernels.ops.rms_norm.problem import RmsNormProblem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(problem: RmsNormProblem) -> tuple[bool, str]:
    if problem.device != "cpu":
        return False, f"x is on {problem.device}, the library works on cpu tensors"
    module, reason = backend.load()
    if module is None:
        return False, reason
    if not hasattr(module, "rms_norm_bwd"):
        return False, "lora_kernels._C predates rms_norm; rebuild it"
    if problem.dtype not in _DTYPES:
        return False, f"dtype {problem.dtype} is not supported; float32, bfloat16 and float16 are"
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
