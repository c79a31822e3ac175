"""The problem description that predicates, `explain`, benchmarks and tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops import _dispatch, _evidence, _shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("reference", "aten", "cpu", "triton", "cuda")
OP = "rms_norm"


@dataclass(frozen=True)
class RmsNormProblem:
    """Y [M, K] and, with R > 0 rows of A, S [M, R]. weight_dtype None: no weight."""

    M: int
    K: int
    R: int = 0
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = torch.float32
    device: str = "cpu"

    @classmethod
    def of(cls, x: Tensor, weight: Tensor | None, lora_as: Sequence[Tensor]) -> RmsNormProblem:
        return cls(
            x.shape[0], x.shape[1], sum(a.shape[0] for a in lora_as), x.dtype,
            None if weight is None else weight.dtype, x.device.type,
        )  # fmt: skip

    @classmethod
    def from_shapes(cls, **shapes: Any) -> RmsNormProblem:
        """From keywords for `lk.explain`: M, K, and where they differ the other fields; the weight
        has the dtype of x unless weight_dtype says otherwise."""
        _shapes.check_names(cls, shapes, ("M", "K"))
        shapes.setdefault("dtype", torch.float32)
        shapes.setdefault("weight_dtype", shapes["dtype"])
        _shapes.read_dtype(shapes, DTYPES)
        if shapes["weight_dtype"] is not None:
            _shapes.read_dtype(shapes, DTYPES, "weight_dtype")
        return cls(**shapes)


def supports(backend: str, problem: RmsNormProblem) -> tuple[bool, str]:
    """Can this backend run this problem; the reason is for people."""
    if backend == "reference":
        return True, "plain PyTorch, every step spelled out"
    if backend == "aten":
        return True, "PyTorch's kernel on a GPU, element-wise calls in pieces on the CPU"
    if backend == "cpu":
        from lora_kernels.ops.rms_norm import cpu

        return cpu.supports(problem)
    if backend == "triton":
        from lora_kernels.ops.rms_norm import triton

        return triton.supports(problem)
    if backend == "cuda":
        from lora_kernels.ops.rms_norm import cuda

        return cuda.supports(problem)
    return False, f"{OP} has no {backend} kernels"


def choose(
    problem: RmsNormProblem, requested: str | None = None, direction: str = "fwd"
) -> tuple[str, str]:
    """(backend, reason) that would run `problem` in one direction, ``fwd`` or ``bwd``."""
    name = _dispatch.requested_backend(requested)
    if name == "auto" and problem.device != "cpu":
        return _evidence.choose(OP, BACKENDS, problem, direction, supports)
    return _dispatch.resolve_once(OP, name, ("cpu", "aten"), supports, problem)


def launcher(problem: RmsNormProblem, requested: str, direction: str) -> ModuleType:
    name, _ = choose(problem, requested, direction)
    return _dispatch.backend_module(OP, name)


def flops(problem: RmsNormProblem, direction: str) -> float:
    """Forward: square, sum, two products, and 2 R for S; backward: about nine (dX and dW)."""
    p = problem
    return p.M * p.K * (4.0 + 2.0 * p.R) if direction == "fwd" else 9.0 * p.M * p.K


def min_bytes(problem: RmsNormProblem, direction: str) -> float:
    """Forward: X read, Y, rstd and S written. Backward: dY, X and rstd read, dX written."""
    p = problem
    size, wide = p.dtype.itemsize, max(4, p.dtype.itemsize)
    gain = 0 if p.weight_dtype is None else p.weight_dtype.itemsize * p.K
    if direction == "fwd":
        return float(size * (2 * p.M * p.K + p.M * p.R + p.R * p.K) + wide * p.M + gain)
    return float(size * 3 * p.M * p.K + wide * p.M + 2 * gain)
