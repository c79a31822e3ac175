"""The problem description that predicates, `explain`, benchmarks and tests share."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops import _dispatch, _evidence, _shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")
BACKENDS = ("reference", "aten", "cpu", "triton", "cuda")
OP = "gated_activation"


@dataclass(frozen=True)
class GatedActivationProblem:
    """H [M, N] from gate [M, N] and, where it is gated, up [M, N].

    rank: forward: columns of S, made with H; 0: none. member_ranks: backward: rank of the adapter
    of gate and, where it is gated, of up, whose dS (and dB, with_db) are made with the gradients;
    empty: none. adapter_dtype: of their A or B. `device_index` counts GPUs.
    """

    M: int
    N: int
    kind: str = "silu"
    gated: bool = True
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    rank: int = 0
    member_ranks: tuple[int, ...] = ()
    with_db: bool = False
    adapter_dtype: torch.dtype | None = None
    device_index: int = 0

    @classmethod
    def of_fwd(
        cls, gate: Tensor, up: Tensor | None, kind: str, lora_as: list[Tensor]
    ) -> GatedActivationProblem:
        return cls(
            gate.shape[0], gate.shape[1], kind, up is not None, gate.dtype, gate.device.type,
            rank=sum(a.shape[0] for a in lora_as),
            adapter_dtype=lora_as[0].dtype if lora_as else None,
            device_index=gate.device.index or 0,
        )  # fmt: skip

    @classmethod
    def of_bwd(
        cls, gate: Tensor, up: Tensor | None, kind: str, lora_bs: list[Tensor], s: Tensor | None
    ) -> GatedActivationProblem:
        return cls(
            gate.shape[0], gate.shape[1], kind, up is not None, gate.dtype, gate.device.type,
            member_ranks=tuple(b.shape[1] for b in lora_bs), with_db=s is not None,
            adapter_dtype=lora_bs[0].dtype if lora_bs else None,
            device_index=gate.device.index or 0,
        )  # fmt: skip

    def evidence_key(self) -> _evidence.Key:
        """Ranks are kinds: a measurement with none says nothing about one."""
        return _evidence.fields_key(self, exact=("rank",))

    @classmethod
    def from_shapes(cls, **shapes: Any) -> GatedActivationProblem:
        """From keywords for `lk.explain`: M, N, and where they differ the other fields."""
        _shapes.check_names(cls, shapes, ("M", "N"))
        if shapes.get("kind", "silu") not in KINDS:
            raise InvalidArgumentError(
                f"kind={shapes['kind']!r} is not supported; accepted: {', '.join(KINDS)}"
            )
        _shapes.read_dtype(shapes, DTYPES)
        return cls(**shapes)


def supports(backend: str, problem: GatedActivationProblem) -> tuple[bool, str]:
    """Can this backend run this problem; the reason is for people."""
    if backend == "reference":
        return True, "plain PyTorch, every step spelled out"
    if backend == "aten":
        return True, "element-wise library calls, a cache-sized piece at a time on the CPU"
    module, why = backend_module(backend)
    return (False, why) if module is None else module.supports(problem)


@functools.cache
def backend_module(name: str) -> tuple[ModuleType | None, str]:
    """(this op's module of a backend, "") or (None, why it cannot be imported)."""
    path = f"lora_kernels.ops.{OP}.{name}"
    if importlib.util.find_spec(path) is None:
        return None, f"{OP} has no {name} kernels"
    try:
        return importlib.import_module(path), ""
    except ImportError as error:
        return None, f"the {name} kernels cannot be imported: {error}"


def choose(
    problem: GatedActivationProblem, requested: str | None = None, direction: str = "fwd"
) -> tuple[str, str]:
    """(backend, reason) that would run `problem` in one direction, ``fwd`` or ``bwd``."""
    name = _dispatch.requested_backend(requested)
    if name == "auto" and problem.device != "cpu":
        return _evidence.choose(OP, BACKENDS, problem, direction, supports)
    return _dispatch.resolve_once(OP, name, ("cpu", "aten"), supports, problem)


def launcher(problem: GatedActivationProblem, requested: str, direction: str) -> ModuleType:
    name, _ = choose(problem, requested, direction)
    return importlib.import_module(f"lora_kernels.ops.{OP}.{name}")


_FLOPS = {"silu": 4.0, "gelu": 10.0, "gelu_tanh": 10.0, "relu": 1.0, "relu_squared": 2.0}


def flops(problem: GatedActivationProblem, direction: str) -> float:
    """A transcendental function counts as one operation; about twice as many backward. Of the
    adapters: S forward, dS and dB backward."""
    p = problem
    one = p.M * p.N * (_FLOPS[p.kind] + p.gated)
    if direction == "fwd":
        return one + 2.0 * p.M * p.N * p.rank
    return 2.0 * one + 2.0 * p.M * p.N * sum(p.member_ranks) * (1 + p.with_db)


def min_bytes(problem: GatedActivationProblem, direction: str) -> float:
    """Forward: operands read, H written. Backward: those and dH read, a gradient each written.
    Of the adapters every operand once."""
    p = problem
    e, operands = p.dtype.itemsize, 1 + p.gated
    own = e if p.adapter_dtype is None else p.adapter_dtype.itemsize
    if direction == "fwd":
        return float(e * p.M * (p.N * (operands + 1) + p.rank) + own * p.rank * p.N)
    r = sum(p.member_ranks)
    return float(
        e * p.M * (p.N * (2 * operands + 1) + r * (1 + p.with_db)) + own * r * p.N * (1 + p.with_db)
    )
