"""The problem description that predicates, `explain`, benchmarks and tests share."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops import _dispatch, _evidence, _shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("reference", "aten", "cpu", "triton")
OP = "linear_cross_entropy"


@dataclass(frozen=True)
class LinearCrossEntropyProblem:
    """Losses [M] from hidden states [M, K] and a head [V, K]; `rank` 0: no adapter."""

    M: int
    K: int
    V: int
    rank: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, lora_a: Tensor | None) -> LinearCrossEntropyProblem:
        return cls(
            M=hidden.shape[0],
            K=hidden.shape[1],
            V=weight.shape[0],
            rank=0 if lora_a is None else lora_a.shape[0],
            dtype=hidden.dtype,
            device=hidden.device.type,
        )

    @classmethod
    def from_shapes(cls, **shapes: Any) -> LinearCrossEntropyProblem:
        """From keywords M, K, V, rank, dtype, device: for `lk.explain`."""
        _shapes.check_names(cls, shapes, ("M", "K", "V"))
        _shapes.read_dtype(shapes, DTYPES)
        return cls(**shapes)


def supports(backend: str, problem: LinearCrossEntropyProblem) -> tuple[bool, str]:
    """Can this backend run this problem; the reason is for people."""
    if backend == "reference":
        return True, "plain PyTorch, all logits at once"
    if backend == "aten":
        return True, "library GEMMs, some rows of logits at a time"
    if backend == "cpu":
        from lora_kernels.ops.linear_cross_entropy import cpu

        return cpu.supports(problem)
    if backend == "triton":
        from lora_kernels.ops.linear_cross_entropy import triton

        return triton.supports(problem)
    return False, f"{OP} has no {backend} kernels"


def choose(problem: LinearCrossEntropyProblem, requested: str | None = None) -> tuple[str, str]:
    """(backend, reason) that would run `problem`. Both ways are one choice: in training the
    forward makes the gradients, and that is what is measured as it."""
    name = _dispatch.requested_backend(requested)
    if name == "auto" and problem.device != "cpu":
        return _evidence.choose(OP, BACKENDS, problem, "fwd", supports)
    return _dispatch.resolve(OP, name, ("cpu",), lambda b: supports(b, problem))


def launcher(problem: LinearCrossEntropyProblem, requested: str) -> ModuleType:
    name, _ = choose(problem, requested)
    return importlib.import_module(f"lora_kernels.ops.{OP}.{name}")


def flops(problem: LinearCrossEntropyProblem, direction: str) -> float:
    """Multiply-adds count two. `fwd`: logits; `bwd`: logits again, dHidden and the adapter."""
    m, k, v, r = problem.M, problem.K, problem.V, problem.rank
    logits = 2.0 * m * v * k + 2.0 * m * r * (k + v)
    return logits if direction == "fwd" else 2.0 * logits + 2.0 * m * r * (k + v)


def min_bytes(problem: LinearCrossEntropyProblem, direction: str) -> float:
    """Every operand read once, every result written once; no logits."""
    e, m, k, v, r = problem.dtype.itemsize, problem.M, problem.K, problem.V, problem.rank
    fwd = e * (m * k + v * k + r * (k + v)) + 8 * m
    return float(fwd if direction == "fwd" else fwd + e * m * k + 4 * r * (k + v))
