"""rope on the compiled CUDA kernel (csrc/rope/cuda): one launch for q and k, either way.

Heads may have any strides; nothing is copied. Where rows of heads are multiples of 16 bytes every
access has 16 bytes. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels._backends import cuda as backend
from lora_kernels.ops.rope.problem import RopeProblem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_TENSORS = 8  # kMaxTensors of csrc/rope/cuda/params.h
_MAX_HEAD = 65536
_MAX_HEADS = 2**20
_MAX_POSITIONS = 2**31 - 1024


def supports(problem: RopeProblem) -> tuple[bool, str]:
    """Can the kernel run `problem`, at whatever speed."""
    if problem.device != "cuda":
        return False, f"q is on {problem.device}, the kernels work on cuda tensors"
    if problem.dtype not in _DTYPES:
        return False, f"dtype {problem.dtype} is not supported; float32, bfloat16 and float16 are"
    if problem.D > _MAX_HEAD:
        return False, f"a head of {problem.D} is too large; at most {_MAX_HEAD}"
    if problem.H + problem.Hk > _MAX_HEADS:
        return False, f"{problem.H + problem.Hk} heads are too many; at most {_MAX_HEADS}"
    if problem.B * problem.S > _MAX_POSITIONS:
        return False, f"more than {_MAX_POSITIONS} positions are not supported"
    reason = backend.lacking("rope_rotate", "rope")
    return not reason, reason or "CUDA C++ kernels"


def _table(t: Tensor) -> Tensor:
    """The kernel reads fp32 and 16-bit tables; fp64 is rounded to fp32 first."""
    return t if t.dtype in _DTYPES else t.to(torch.float32)


def _rotate(
    heads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, inverse: bool,
) -> list[Tensor]:  # fmt: skip
    library, reason = backend.load()
    assert library is not None, reason
    tables = (_table(cos), _table(sin), position_ids, interleaved)
    made: list[Tensor] = []
    for first in range(0, len(heads), _MAX_TENSORS):
        made += library.rope_rotate(heads[first : first + _MAX_TENSORS], *tables, inverse)
    return made


def rotate_in_place(
    heads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> list[Tensor]:
    """The very tensors of heads [..., S, H, D], rotated."""
    library, reason = backend.load()
    assert library is not None, reason
    for first in range(0, len(heads), _MAX_TENSORS):
        some = heads[first : first + _MAX_TENSORS]
        library.rope_rotate_in_place(some, _table(cos), _table(sin), position_ids, interleaved)
    return heads


def rope_fwd(
    heads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> list[Tensor]:
    """Every tensor of heads [..., S, H, D] rotated."""
    return _rotate(heads, cos, sin, position_ids, interleaved, False)


def rope_bwd(
    grads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> list[Tensor]:
    """Gradients of heads from those of the results."""
    return _rotate(grads, cos, sin, position_ids, interleaved, True)
