"""The problem description that predicates, `explain`, benchmarks and tests share."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from lora_kernels.ops import _dispatch, _evidence, _shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("reference", "aten", "triton", "cuda")
OP = "lora_qkv"


@dataclass(frozen=True)
class LoraQkvProblem:
    """Q [M, H D], K [M, Hk D] and V [M, Hk D] from X [M, K]; R channels of a head are rotated.
    `rank` is the largest of the `members`, the projections that these are made by, of which
    `frozen` have no adapter."""

    M: int
    K: int
    H: int
    Hk: int
    D: int
    R: int
    rank: int = 16
    interleaved: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    dropout_p: float = 0.0
    members: int = 3
    frozen: int = 0

    def evidence_key(self) -> _evidence.Key:
        """A measurement speaks for its own size of heads alone."""
        return _evidence.fields_key(self, exact=("D", "R", "members", "frozen"))

    @classmethod
    def from_shapes(cls, **shapes: Any) -> LoraQkvProblem:
        """From keywords for `lk.explain`: M, K, H, D, and where they differ Hk and R."""
        _shapes.check_names(cls, shapes, ("M", "K", "H", "D"))
        shapes.setdefault("Hk", shapes["H"])
        shapes.setdefault("R", shapes["D"])
        _shapes.read_dtype(shapes, DTYPES)
        return cls(**shapes)


def supports(backend: str, problem: LoraQkvProblem) -> tuple[bool, str]:
    """Can this backend run this problem; the reason is for people."""
    if backend == "reference":
        return True, "plain PyTorch"
    if backend == "aten":
        return True, "lora_linear, and rope in place of what it has just written"
    if backend in ("triton", "cuda"):
        answer: tuple[bool, str] = backend_module(backend).supports(problem)
        return answer
    return False, f"{OP} has no {backend} kernels; lora_linear and rope inside may"


def choose(
    problem: LoraQkvProblem, requested: str | None = None, direction: str = "fwd"
) -> tuple[str, str]:
    """(backend, reason) that would run `problem`; the backward is rope's and lora_linear's."""
    name = _dispatch.requested_backend(requested)
    if name not in ("auto", *BACKENDS) and requested is None:
        # LORA_KERNELS_BACKEND names a backend of the ops inside.
        return "aten", f"lora_linear and rope on {name}"
    if name == "auto" and problem.device != "cpu":
        return _evidence.choose(OP, BACKENDS, problem, direction, supports)
    chosen, why = _dispatch.resolve(OP, name, (), lambda b: supports(b, problem))
    return chosen, supports(chosen, problem)[1] if name == "auto" else why


def inner_backend(requested: str | None) -> str:
    """The backend that lora_linear and rope are asked for inside: the same where one is named."""
    return _dispatch.requested_backend(requested)


def backend_module(name: str) -> ModuleType:
    return importlib.import_module(f"lora_kernels.ops.{OP}.{name}")


def flops(problem: LoraQkvProblem, direction: str) -> float:
    """Multiply-adds count two; three per rotated channel."""
    p = problem
    n = (p.H + 2 * p.Hk) * p.D
    base, lora = 2.0 * p.M * p.K * n, 2.0 * p.M * p.rank * (3 * p.K + n)
    turned = 3.0 * p.M * (p.H + p.Hk) * p.R
    return base + turned + (lora if direction == "fwd" else 2.0 * lora)


def min_bytes(problem: LoraQkvProblem, direction: str) -> float:
    """Every operand read once, every result written once."""
    p, e = problem, problem.dtype.itemsize
    n = (p.H + 2 * p.Hk) * p.D
    fwd = e * (p.M * p.K + n * p.K + p.rank * (3 * p.K + n) + p.M * n + 3 * p.M * p.rank)
    fwd += 2 * 4 * p.M * p.R
    return float(fwd if direction == "fwd" else fwd + e * (p.M * p.K + p.rank * (3 * p.K + n)))
