"""The problem description that predicates, `explain`, benchmarks and tests share."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from types import ModuleType

import torch

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops import _dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")
BACKENDS = ("reference", "aten", "cpu")
OP = "gated_activation"


@dataclass(frozen=True)
class GatedActivationProblem:
    """H [M, N] from gate [M, N] and, where it is gated, up [M, N]."""

    M: int
    N: int
    kind: str = "silu"
    gated: bool = True
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @classmethod
    def from_shapes(cls, **shapes: object) -> GatedActivationProblem:
        """From keywords for `lk.explain`: M, N, and where they differ the other fields."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(shapes) - known)
        if unknown:
            raise InvalidArgumentError(
                f"unknown argument {unknown[0]!r}; accepted: {', '.join(sorted(known))}"
            )
        missing = [n for n in ("M", "N") if n not in shapes]
        if missing:
            raise InvalidArgumentError(f"argument {missing[0]!r} is missing; needed: M, N")
        if shapes.get("kind", "silu") not in KINDS:
            raise InvalidArgumentError(
                f"kind={shapes['kind']!r} is not supported; accepted: {', '.join(KINDS)}"
            )
        dtype = shapes.get("dtype", torch.float32)
        if isinstance(dtype, str):
            shapes["dtype"] = getattr(torch, dtype.removeprefix("torch."), None)
        if shapes.get("dtype", torch.float32) not in DTYPES:
            raise InvalidArgumentError(
                f"dtype={dtype!r} is not supported; accepted: "
                + ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            )
        return cls(**shapes)  # type: ignore[arg-type]


def supports(backend: str, problem: GatedActivationProblem) -> tuple[bool, str]:
    """Can this backend run this problem; the reason is for people."""
    if backend == "reference":
        return True, "plain PyTorch, every step spelled out"
    if backend == "aten":
        return True, "element-wise library calls, a cache-sized piece at a time on the CPU"
    if backend == "cpu":
        from lora_kernels.ops.gated_activation import cpu

        return cpu.supports(problem)
    return False, f"{OP} has no {backend} kernels"


def choose(problem: GatedActivationProblem, requested: str | None = None) -> tuple[str, str]:
    """(backend, reason) that would run `problem`."""
    name = _dispatch.requested_backend(requested)
    return _dispatch.resolve(OP, name, ("cpu", "aten"), lambda b: supports(b, problem))


def launcher(problem: GatedActivationProblem, requested: str) -> ModuleType:
    name, _ = choose(problem, requested)
    return importlib.import_module(f"lora_kernels.ops.{OP}.{name}")


_FLOPS = {"silu": 4.0, "gelu": 10.0, "gelu_tanh": 10.0, "relu": 1.0, "relu_squared": 2.0}


def flops(problem: GatedActivationProblem, direction: str) -> float:
    """A transcendental function counts as one operation; about twice as many backward."""
    p = problem
    one = p.M * p.N * (_FLOPS[p.kind] + p.gated)
    return one if direction == "fwd" else 2.0 * one


def min_bytes(problem: GatedActivationProblem, direction: str) -> float:
    """Forward: operands read, H written. Backward: those and dH read, a gradient each written."""
    p = problem
    operands = 1 + p.gated
    tensors = operands + 1 if direction == "fwd" else 2 * operands + 1
    return float(p.dtype.itemsize * p.M * p.N * tensors)
