"""The problem description of dora_linear that `explain`, benchmarks and tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_kernels.ops import _dispatch, _shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("reference", "aten")


@dataclass(frozen=True)
class DoraLinearProblem:
    """Y [M, N] from X [M, K]."""

    M: int
    K: int
    N: int
    rank: int = 16
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    dropout_p: float = 0.0

    @classmethod
    def from_shapes(cls, **shapes: Any) -> DoraLinearProblem:
        """From keywords M, K, N, rank, dtype, device, dropout_p: for `lk.explain`."""
        _shapes.check_names(cls, shapes, ("M", "K", "N"))
        _shapes.read_dtype(shapes, DTYPES)
        return cls(**shapes)


def supports(backend: str, problem: DoraLinearProblem) -> tuple[bool, str]:
    """Can this backend run this problem; the reason is for people."""
    if backend == "reference":
        return True, "plain PyTorch"
    if backend == "aten":
        return True, "row norms and scaling around lora_linear"
    return False, f"dora_linear has no {backend} kernels"


def choose(problem: DoraLinearProblem, requested: str | None = None) -> tuple[str, str]:
    """(backend, reason) that would run `problem`."""
    name = _dispatch.requested_backend(requested)
    if name not in ("auto", *BACKENDS) and requested is None:
        # LORA_KERNELS_BACKEND names a backend of lora_linear, which serves the product inside.
        return "aten", f"row norms and scaling around lora_linear on {name}"
    chosen, why = _dispatch.resolve("dora_linear", name, (), lambda b: supports(b, problem))
    return chosen, supports(chosen, problem)[1] if name == "auto" else why


def inner_backend(requested: str | None) -> str:
    """The backend that lora_linear is asked for inside."""
    name = _dispatch.requested_backend(requested)
    return "aten" if requested == "aten" or name == "aten" else name


def flops(problem: DoraLinearProblem, direction: str) -> float:
    """Multiply-adds count two; the row norms are part of the forward."""
    m, k, n, r = problem.M, problem.K, problem.N, problem.rank
    base, lora = 2.0 * m * k * n, 2.0 * m * r * (k + n)
    twice = 2.0 if problem.dropout_p > 0.0 else 1.0
    if direction == "fwd":
        return twice * base + lora + 2.0 * n * k * (r + 1)
    return twice * base + 2.0 * lora


def min_bytes(problem: DoraLinearProblem, direction: str) -> float:
    """Every operand read once, every result written once; P is kept for the magnitude."""
    e, m, k, n, r = problem.dtype.itemsize, problem.M, problem.K, problem.N, problem.rank
    fwd = e * (m * k + n * k + r * (k + n) + 2 * m * n + m * r) + 4 * 2 * n
    return float(fwd if direction == "fwd" else fwd + e * (m * k + r * (k + n)))
