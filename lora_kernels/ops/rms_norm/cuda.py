"""rms_norm on the compiled CUDA kernels (csrc/rms_norm/cuda).

Forward one launch, which makes S of up to 64 columns on the way (of more, lora_linear's shrink
reads y). Backward one launch for dx and shares of dweight, one that adds those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels._backends import cuda as backend
from lora_kernels.ops.rms_norm.problem import RmsNormProblem

_DTYPES = (torch.bfloat16, torch.float16)
_KERNEL_DTYPES = (torch.float32, *_DTYPES)
_MAX_GROUP, _MAX_RANK = 8, 256
_MAX_COLUMNS = 24000  # kMaxGradientColumns of csrc/rms_norm/cuda/params.h
_MAX_ROWS = 2**31 - 1024


def supports(problem: RmsNormProblem) -> tuple[bool, str]:
    """Can the kernels run `problem`, at whatever speed."""
    if problem.device != "cuda":
        return False, f"x is on {problem.device}, the kernels work on cuda tensors"
    if problem.dtype not in _DTYPES:
        return False, f"dtype {problem.dtype} is not supported; bfloat16 and float16 are"
    if problem.weight_dtype not in (None, *_KERNEL_DTYPES):
        kind = problem.weight_dtype
        return False, f"weight in {kind} is not supported; float32, bfloat16 and float16 are"
    if problem.K > _MAX_COLUMNS:
        return False, f"rows of {problem.K} are too long; at most {_MAX_COLUMNS}"
    if problem.M > _MAX_ROWS:
        return False, f"more than {_MAX_ROWS} rows are not supported"
    reason = backend.lacking("rms_norm_bwd", "rms_norm")
    return not reason, reason or "CUDA C++ kernels"


def _adapter(t: Tensor) -> Tensor:
    """The kernels read fp32 and 16-bit adapters; fp64 is rounded to fp32 first."""
    return t if t.dtype in _KERNEL_DTYPES else t.to(torch.float32)


def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, lora_as: list[Tensor], eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Y [M, K] in the dtype of x, rstd [M] in fp32, S [M, sum of ranks] in the dtype of x."""
    library, reason = backend.load()
    assert library is not None, reason
    members = [_adapter(part) for a in lora_as for part in a.split(_MAX_RANK) if a.shape[0]]
    y, rstd, s = library.rms_norm_fwd(x, weight, members[:_MAX_GROUP], eps, offset)
    parts = [s]
    for first in range(_MAX_GROUP, len(members), _MAX_GROUP):  # S of the rest of a large group
        some = members[first : first + _MAX_GROUP]
        parts.append(library.rms_norm_fwd(x, weight, some, eps, offset)[2])
    return y, rstd, s if len(parts) == 1 else torch.cat(parts, 1)


def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, need_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """dX [M, K] in the dtype of x; dW [K] in that of weight, None where it is not needed."""
    library, reason = backend.load()
    assert library is not None, reason
    wanted = weight is not None and need_dweight
    dx, dw = library.rms_norm_bwd(dy, x, weight, rstd.contiguous(), offset, wanted)
    return dx, dw if wanted else None
