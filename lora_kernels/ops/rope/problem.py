"""The problem description that predicates, `explain`, benchmarks and tests share."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from lora_kernels.ops import _dispatch, _evidence, _shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("reference", "aten", "cpu", "triton", "cuda")
OP = "rope"


@dataclass(frozen=True)
class RopeProblem:
    """q [B, S, H, D] and k [B, S, Hk, D], of which R channels are rotated; Hk 0: no k."""

    B: int
    S: int
    H: int
    D: int
    Hk: int
    R: int
    interleaved: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def evidence_key(self) -> _evidence.Key:
        """A measurement speaks for its own size of heads alone."""
        return _evidence.fields_key(self, exact=("D", "R"))

    @classmethod
    def from_shapes(cls, **shapes: Any) -> RopeProblem:
        """From keywords for `lk.explain`: B, S, H, D, and where they differ Hk and R."""
        _shapes.check_names(cls, shapes, ("B", "S", "H", "D"))
        shapes.setdefault("Hk", shapes["H"])
        shapes.setdefault("R", shapes["D"])
        _shapes.read_dtype(shapes, DTYPES)
        return cls(**shapes)


def supports(backend: str, problem: RopeProblem) -> tuple[bool, str]:
    """Can this backend run this problem; the reason is for people."""
    if backend == "reference":
        return True, "plain PyTorch, the rotated copy spelled out"
    if backend == "aten":
        return True, "element-wise library calls, no turned copy of the heads"
    if backend == "cpu":
        from lora_kernels.ops.rope import cpu

        return cpu.supports(problem)
    if backend == "triton":
        from lora_kernels.ops.rope import triton

        return triton.supports(problem)
    if backend == "cuda":
        from lora_kernels.ops.rope import cuda

        return cuda.supports(problem)
    return False, f"{OP} has no {backend} kernels"


def choose(
    problem: RopeProblem, requested: str | None = None, direction: str = "fwd"
) -> tuple[str, str]:
    """(backend, reason) that would run `problem` in one direction, ``fwd`` or ``bwd``."""
    name = _dispatch.requested_backend(requested)
    if name == "auto" and problem.device != "cpu":
        return _evidence.choose(OP, BACKENDS, problem, direction, supports)
    return _dispatch.resolve_once(OP, name, ("cpu", "aten"), supports, problem)


def launcher(problem: RopeProblem, requested: str, direction: str) -> ModuleType:
    return _dispatch.backend_module(OP, choose(problem, requested, direction)[0])


def flops(problem: RopeProblem, direction: str) -> float:
    """Two multiplications and an addition for each rotated channel, either way."""
    p = problem
    return 3.0 * p.B * p.S * (p.H + p.Hk) * p.R


def min_bytes(problem: RopeProblem, direction: str) -> float:
    """q and k read once and written once, cos and sin of every position read once in fp32."""
    p = problem
    return float(2 * p.dtype.itemsize * p.B * p.S * (p.H + p.Hk) * p.D + 2 * 4 * p.S * p.R)
