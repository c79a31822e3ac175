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
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops import _dispatch, _evidence, _shapes
from lora_kernels.ops.quant_linear import formats
from lora_kernels.ops.quant_linear.formats import FLOATS, QuantSpec, parts_of

BACKENDS = ("reference", "aten", "cpu", "triton", "cuda")
# Names that quantize and explain take, and the (format, layout) they stand for.
FORMAT_NAMES: dict[str, tuple[str, str]] = {
    "nf4": ("nf4", formats.FLAT),
    "fp4": ("fp4", formats.FLAT),
    "int8": ("int8", formats.INT8_ROW),
    "int4": ("int4", formats.GPTQ),
    "int4_awq": ("int4", formats.AWQ),
    "fp8": ("fp8", formats.FP8_ROW),
    "fp8_tensor": ("fp8", formats.FP8_TENSOR),
    "fp8_row": ("fp8", formats.FP8_ROW),
    "fp8_block": ("fp8", formats.FP8_BLOCK),
}
# Rows up to which GPU kernels of a kind serve: none is dequantization, see cuda.py and configs.py.
_ROWS = ((0, "none"), (16, "1-16"), (128, "17-128"))


@dataclass(frozen=True)
class QuantLinearProblem:
    """Y [M, N] from X [M, K] and a quantized W; rank 0 is no adapter, M 0 plain dequantization."""

    M: int
    K: int
    N: int
    rank: int = 0
    format: str = "nf4"
    layout: str = formats.FLAT
    block_size: int = 64
    nested: bool = False
    act_order: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    dropout_p: float = 0.0

    @classmethod
    def of(
        cls, x: Tensor, spec: QuantSpec, lora_a: Tensor | None, dropout_p: float
    ) -> QuantLinearProblem:
        rank = 0 if lora_a is None else lora_a.shape[0]
        return cls._from_spec(x.shape[0], spec, rank, x.dtype, x.device.type, dropout_p)

    @classmethod
    def of_dequantize(cls, spec: QuantSpec, dtype: torch.dtype, device: str) -> QuantLinearProblem:
        return cls._from_spec(0, spec, 0, dtype, device, 0.0)

    @classmethod
    def _from_spec(
        cls, m: int, spec: QuantSpec, rank: int, dtype: torch.dtype, device: str, dropout_p: float
    ) -> QuantLinearProblem:
        return cls(
            m, spec.columns, spec.rows, rank, spec.format, spec.layout, spec.block_size,
            spec.nested_block_size > 0, spec.act_order, dtype, device, dropout_p,
        )  # fmt: skip

    @classmethod
    def from_shapes(cls, **shapes: Any) -> QuantLinearProblem:
        """From keywords M, K, N, rank, format (a name of :data:`FORMAT_NAMES`), ..."""
        _shapes.check_names(cls, shapes, ("M", "K", "N"))
        name = shapes.get("format", "nf4")
        if "layout" not in shapes:
            if name not in FORMAT_NAMES:
                raise InvalidArgumentError(f"format={name!r}; accepted: {', '.join(FORMAT_NAMES)}")
            shapes["format"], shapes["layout"] = FORMAT_NAMES[str(name)]
        _shapes.read_dtype(shapes, FLOATS)
        return cls(**shapes)

    def evidence_key(self) -> _evidence.Key:
        """A measurement speaks for its own block size alone, and for the kernels that it ran: they
        differ by whether the packed weight itself is multiplied, and there by the rows."""
        key = _evidence.fields_key(self, exact=("block_size",))
        rows = next((name for most, name in _ROWS if most >= self.M), "more")
        packed = not _gpu("cuda").skinny_reason(self.spec, min(self.M, 1))
        return _evidence.Key(key.sizes, {**key.kind, "rows": rows, "packed": packed})

    @property
    def spec(self) -> QuantSpec:
        nested = formats.NESTED_BLOCK if self.nested else 0
        return QuantSpec(
            self.format, self.layout, (self.N, self.K), self.dtype, self.block_size, nested,
            self.act_order,
        )  # fmt: skip


@functools.cache
def _cpu() -> tuple[ModuleType | None, str]:
    """(the cpu backend, "") or (None, why it cannot be used)."""
    if importlib.util.find_spec("lora_kernels.ops.quant_linear.cpu") is None:
        return None, "quant_linear has no cpu kernels"
    library, reason = cpu_library.load()
    if library is None:
        return None, reason
    if not all(hasattr(library, f"quant_linear_{name}") for name in ("engine", "fwd", "bwd")):
        return None, "lora_kernels._C was built before quant_linear; rebuild it"
    return importlib.import_module("lora_kernels.ops.quant_linear.cpu"), ""


@functools.cache
def _gpu(backend: str) -> ModuleType:
    return importlib.import_module(f"lora_kernels.ops.quant_linear.{backend}")


def supports(backend: str, problem: QuantLinearProblem) -> tuple[bool, str]:
    """Can this backend run this problem; the reason is for people."""
    if backend == "reference":
        return True, "plain PyTorch"
    if backend == "aten":
        return True, "library GEMMs"
    if backend == "cpu":
        module, why = _cpu()
        return (False, why) if module is None else module.supports(problem)
    if backend in ("triton", "cuda"):
        able, why = _gpu(backend).supports(problem)
        return bool(able), str(why)
    return False, f"quant_linear has no {backend} kernels"


def choose(
    problem: QuantLinearProblem, requested: str | None = None, direction: str = "fwd"
) -> tuple[str, str]:
    """(backend, reason) that would run `problem` in one direction, ``fwd`` or ``bwd``."""
    name = _dispatch.requested_backend(requested)
    if name == "auto" and problem.device != "cpu":
        return _evidence.choose("quant_linear", BACKENDS, problem, direction, supports)
    return _choose(problem, name, os.environ.get("LORA_KERNELS_DISABLE", ""))


@functools.lru_cache(maxsize=1024)
def _choose(problem: QuantLinearProblem, name: str, disabled: str) -> tuple[str, str]:
    """Cached on all that the answer depends on: `disabled` serves the key alone."""

    def preferred(candidate: str) -> tuple[bool, str]:
        module, why = _cpu()
        return (False, why) if module is None else module.preferred(problem)

    if name == "auto":
        return _dispatch.resolve("quant_linear", name, ("cpu",), preferred)
    return _dispatch.resolve("quant_linear", name, (), lambda b: supports(b, problem))


def weight_bytes(problem: QuantLinearProblem) -> float:
    """Packed data and statistics."""
    return float(
        sum(
            functools.reduce(lambda a, b: a * b, p.shape, 1) * p.dtypes[0].itemsize
            for p in parts_of(problem.spec)
        )
    )


def flops(problem: QuantLinearProblem, direction: str) -> float:
    """Multiply-adds count two. `fwd`: Y; `bwd`: dX, dA, dB."""
    m, k, n, r = problem.M, problem.K, problem.N, problem.rank
    lora = 2.0 * m * r * (k + n)
    return 2.0 * m * k * n + (lora if direction == "fwd" else 2.0 * lora)


def min_bytes(problem: QuantLinearProblem, direction: str) -> float:
    """Every operand read once, every result written once; M 0 writes W."""
    e, m, k = problem.dtype.itemsize, problem.M, problem.K
    n, r = problem.N, problem.rank
    if m == 0:
        return e * k * n + weight_bytes(problem)
    fwd = e * (m * k + r * (k + n) + m * n + m * r) + weight_bytes(problem)
    return float(fwd if direction == "fwd" else fwd + e * (m * k + r * (k + n)))
