"""quant_linear on the compiled CPU library (csrc/quant_linear).

nf4, fp4, int8 and fp8 weights are read where they are. The kernels want int4 weights (gptq, awq) in
rows of nibbles, so a copy is made at the first use: as many bytes as the weight itself, its scales
and zeros in fp32, kept as long as the weight lives and is not written to
(:func:`repacked_bytes` says how much; :func:`clear` drops it).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lora_kernels._backends import cpu as backend
from lora_kernels.ops.quant_linear import formats
from lora_kernels.ops.quant_linear.formats import QuantSpec
from lora_kernels.ops.quant_linear.problem import QuantLinearProblem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Beyond these rows of x the library GEMM, behind dequantization, is faster than the fp32 vectors
# (docs/measured_facts.md). The tile kernels have no such limit.
_MOST_ROWS = {"avx512": 64, "avx2": 64, "baseline": 16}


@dataclass
class _Repacked:
    weight: Any
    storage: StorageWeakRef
    versions: tuple[int, ...]


_repacked: OrderedDict[tuple[object, ...], _Repacked] = OrderedDict()
_lock = threading.Lock()


def supports(problem: QuantLinearProblem) -> tuple[bool, str]:
    """Can the library run `problem`, at whatever speed."""
    if problem.device != "cpu":
        return False, f"the tensors are on {problem.device}, the library works on cpu tensors"
    module, reason = backend.load()
    if module is None:
        return False, reason
    if not hasattr(module, "quant_linear_bwd"):
        return False, "lora_kernels._C was built without quant_linear; rebuild it"
    if problem.dtype not in _DTYPES:
        return False, f"dtype {problem.dtype} is not supported; float32, bfloat16 and float16 are"
    if problem.K == 0 or problem.N == 0:
        return False, "in_features or out_features is 0"
    return True, f"{module.quant_linear_engine(problem.dtype)} kernels"


def preferred(problem: QuantLinearProblem) -> tuple[bool, str]:
    """Is the library the choice of `auto`: it can run `problem` and does not lose to `aten`."""
    able, why = supports(problem)
    if not able:
        return able, why
    module, _ = backend.load()
    assert module is not None
    engine = module.quant_linear_engine(problem.dtype)
    most = _MOST_ROWS.get(engine)
    if most is not None and most < problem.M:
        return False, (
            f"the {engine} kernels do not beat dequantization and a library GEMM "
            f"for more than {most} rows"
        )
    return True, why


def repacked_bytes() -> int:
    """Bytes of all copies of int4 weights that are kept now."""
    with _lock:
        return sum(r.weight.repacked_bytes for r in _repacked.values() if not r.storage.expired())


def clear() -> None:
    """Drop every copy."""
    with _lock:
        _repacked.clear()


def _make(parts: tuple[Tensor, ...], spec: QuantSpec) -> Any:
    module, _ = backend.load()
    assert module is not None
    return module.QuantWeight(
        spec.layout, spec.rows, spec.columns, spec.block_size, spec.nested_block_size,
        formats.INT8_RECIPROCAL, list(parts),
    )  # fmt: skip


def _weight(parts: tuple[Tensor, ...], spec: QuantSpec) -> Any:
    """The library's view of a weight."""
    if spec.format != "int4":
        return _make(parts, spec)
    key = (spec.key, *(t.data_ptr() for t in parts))
    versions = tuple(t._version for t in parts)
    with _lock:
        known = _repacked.get(key)
        if known is not None:
            if not known.storage.expired() and known.versions == versions:
                return known.weight
            del _repacked[key]
    made = _make(parts, spec)
    with _lock:
        for stale in [k for k, r in _repacked.items() if r.storage.expired()]:
            del _repacked[stale]
        _repacked[key] = _Repacked(made, StorageWeakRef(parts[0].untyped_storage()), versions)
    return made


def quantize(w: Tensor, spec: QuantSpec) -> tuple[Tensor, ...] | None:
    """The parts of `w`, the bytes that reference.py gives; None for a format without a kernel."""
    module, _ = backend.load()
    if module is None or not hasattr(module, "quant_linear_bwd"):
        return None
    if w.device.type != "cpu" or w.dtype not in _DTYPES or w.numel() == 0:
        return None
    if spec.layout == formats.INT8_ROW:
        return tuple(module.quant_linear_quantize_rows(w.detach().reshape(spec.rows, spec.columns)))
    if spec.layout != formats.FLAT:
        return None
    code = formats.code_table(spec.format).clone()
    nested_code = formats.dynamic_map().clone()
    made = module.quant_linear_quantize_flat(
        w.detach(), code, spec.block_size, spec.nested_block_size, nested_code, formats.MIN_ABSMAX
    )
    if not spec.nested_block_size:
        packed, absmax = made
        return packed, absmax, code
    packed, absmax, nested_absmax, offset = made
    return packed, absmax, code, nested_absmax, nested_code, offset


def dequantize(
    parts: tuple[Tensor, ...], spec: QuantSpec, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """W of `spec.shape` in `dtype`, into `out` where it is given."""
    module, _ = backend.load()
    assert module is not None
    made = module.quant_linear_dequantize(_weight(parts, spec), dtype, out)
    return made.view(spec.shape)


def quant_linear_fwd(
    x: Tensor,
    parts: tuple[Tensor, ...],
    spec: QuantSpec,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Y [M, N] and S [M, r] in the dtype of x; without an adapter S is [M, 0]."""
    module, _ = backend.load()
    assert module is not None
    y, s = module.quant_linear_fwd(
        x, _weight(parts, spec), bias, lora_a, lora_b, scaling, dropout_p, seed
    )
    return y, s


def quant_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    parts: tuple[Tensor, ...],
    spec: QuantSpec,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    s: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX [M, K], dA and dB in the dtypes of A and B; what is not needed is empty."""
    module, _ = backend.load()
    assert module is not None
    dx, da, db = module.quant_linear_bwd(
        dy, x, _weight(parts, spec), lora_a, lora_b, s, scaling, dropout_p, seed,
        need_dx, need_da, need_db,
    )  # fmt: skip
    return dx, da, db
