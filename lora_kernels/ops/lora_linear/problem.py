"""The problem description that predicates, `explain`, benchmarks and tests share."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_kernels._backends import cpu as cpu_library
from lora_kernels.ops import _dispatch, _evidence, _ledger, _shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("reference", "aten", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class LoraLinearProblem:
    """Y [M, N] from X [M, K]; N and the ranks are per group member. `device_index` counts GPUs;
    `given`: S, or dS in the backward, is an operand. `row_major`: the elements of a
    weight's row lie side by side."""

    M: int
    K: int
    N: tuple[int, ...]
    rank: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    dropout_p: float = 0.0
    frozen: bool = True
    adapter_dtype: torch.dtype | None = None
    device_index: int = 0
    given: bool = False
    row_major: bool = True

    @classmethod
    def of(
        cls, x: Tensor, weights: list[Tensor], lora_as: list[Tensor], dropout_p: float,
        given: bool = False,
    ) -> LoraLinearProblem:  # fmt: skip
        return cls(
            M=x.shape[0],
            K=x.shape[1],
            N=tuple(w.shape[0] for w in weights),
            rank=tuple(a.shape[0] for a in lora_as),
            dtype=x.dtype,
            weight_dtype=weights[0].dtype,
            device=x.device.type,
            dropout_p=dropout_p,
            frozen=not any(w.requires_grad for w in weights),
            adapter_dtype=lora_as[0].dtype,
            device_index=x.device.index or 0,
            given=given,
            row_major=all(w.stride(1) == 1 for w in weights),
        )

    @classmethod
    def from_shapes(cls, **shapes: Any) -> LoraLinearProblem:
        """From keywords M, K, N, rank (int or tuple), dtype, device, ...: for `lk.explain`."""
        _shapes.check_names(cls, shapes, ("M", "K", "N"))
        n = shapes["N"]
        shapes["N"] = n if isinstance(n, tuple) else (n,)
        rank = shapes.get("rank", 16)
        shapes["rank"] = rank if isinstance(rank, tuple) else (rank,) * len(shapes["N"])
        for key in ("dtype", "weight_dtype", "adapter_dtype"):
            if key != "adapter_dtype" or shapes.get(key) is not None:
                _shapes.read_dtype(shapes, DTYPES, key)
        shapes.setdefault("weight_dtype", shapes.get("dtype", torch.float32))
        return cls(**shapes)

    def evidence_key(self) -> _evidence.Key:
        """Sizes and kind as measurements tell them; a group counts as one."""
        return _evidence.Key(
            sizes={"M": self.M, "K": self.K, "N": sum(self.N), "rank": sum(self.rank)},
            kind={
                "members": len(self.N),
                "dtype": _evidence.name_of(self.dtype),
                "adapter_dtype": _evidence.name_of(self.adapter_dtype or self.dtype),
                "dropout": self.dropout_p > 0.0,
            },
        )


def supports(backend: str, problem: LoraLinearProblem) -> tuple[bool, str]:
    """Can this backend run this problem; the reason is for people."""
    if backend == "reference":
        return True, "plain PyTorch"
    if backend == "aten":
        return True, "library GEMMs"
    if backend == "cpu":
        from lora_kernels.ops.lora_linear import cpu

        return cpu.supports(problem)
    if 0 in problem.rank and backend != "cuda":
        return False, "a member has no adapter (rank 0), which these kernels do not take"
    if problem.device == "cuda" and _ledger.device(problem.device_index) is None:
        return False, f"torch sees no GPU {problem.device_index} here"
    module, why = backend_module(backend)
    return (False, why) if module is None else module.supports(problem)


@functools.cache
def backend_module(name: str) -> tuple[ModuleType | None, str]:
    """(this op's module of a backend, "") or (None, why it cannot be imported)."""
    path = f"lora_kernels.ops.lora_linear.{name}"
    if importlib.util.find_spec(path) is None:
        return None, f"lora_linear has no {name} kernels"
    try:
        return importlib.import_module(path), ""
    except ImportError as error:
        missing = (error.name or "").split(".")[0]
        hint = f"; pip install {missing}" if missing not in ("", "lora_kernels", "torch") else ""
        return None, f"the {name} kernels cannot be imported: {error}{hint}"


def choose(problem: LoraLinearProblem, requested: str | None = None) -> tuple[str, str]:
    """(backend, reason) that would run `problem`; says so where the backward is another one's."""
    forward, why = choose_for(problem, requested, "fwd")
    backward, why_backward = choose_for(problem, requested, "bwd")
    if backward != forward:
        why = f"{why}; backward: {backward} ({why_backward})"
    return forward, why


def choose_for(
    problem: LoraLinearProblem, requested: str | None, direction: str
) -> tuple[str, str]:
    """(backend, reason) for one direction, ``fwd`` or ``bwd``."""
    name = _dispatch.requested_backend(requested)
    if name == "auto" and problem.device != "cpu":
        return _evidence.choose("lora_linear", BACKENDS, problem, direction, supports)
    disabled = os.environ.get("LORA_KERNELS_DISABLE", "")
    isa = _cpu_isa() if problem.device == "cpu" else ""
    return _choose(problem, name, direction, disabled, isa)


def _cpu_isa() -> str:
    module, reason = cpu_library.load()
    return reason if module is None else module.isa()


@functools.lru_cache(maxsize=1024)
def _choose(
    problem: LoraLinearProblem, name: str, direction: str, disabled: str, cpu_isa: str
) -> tuple[str, str]:
    """Cached on all that the answer depends on: `disabled` and `cpu_isa` serve the key alone."""
    if name != "auto":
        return _dispatch.resolve("lora_linear", name, (), lambda b: supports(b, problem))
    from lora_kernels.ops.lora_linear import cpu

    return _dispatch.resolve(
        "lora_linear", name, ("cpu",), lambda b: cpu.preferred(problem, direction)
    )


def flops(problem: LoraLinearProblem, direction: str) -> float:
    """Multiply-adds count two. `fwd`: Y; `bwd`: dX, dA, dB."""
    m, k = problem.M, problem.K
    base = sum(2.0 * m * k * n for n in problem.N)
    lora = sum(2.0 * m * r * (k + n) for n, r in zip(problem.N, problem.rank, strict=True))
    return base + lora if direction == "fwd" else base + 2.0 * lora


def min_bytes(problem: LoraLinearProblem, direction: str) -> float:
    """Every operand read once, every result written once."""
    e, m, k = problem.dtype.itemsize, problem.M, problem.K
    n, r = sum(problem.N), sum(problem.rank)
    fwd = e * (m * k + n * k + r * (k + n) + m * n + m * r)
    return float(fwd if direction == "fwd" else fwd + e * (m * k + r * (k + n)))
