"""quant_linear on the compiled CUDA kernels (csrc/quant_linear/cuda).

Up to `SKINNY_ROWS` rows of x the weight is read packed, once per 64 rows, in the forward and for
dX (:func:`skinny_reason` says what that leaves out): one launch, and a second one where the sum is
shared out or there is an adapter, whose low-rank term joins there in fp32. Everything else is a
dequantization and then lora_linear's kernels, or a library GEMM where there is no adapter.
dA and dB come from lora_linear's kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels._backends import cuda as backend
from lora_kernels.ops._philox import keep_scale, threshold
from lora_kernels.ops.quant_linear import formats
from lora_kernels.ops.quant_linear.formats import QuantSpec
from lora_kernels.ops.quant_linear.problem import QuantLinearProblem

SKINNY_ROWS = 128  # kMaxSkinnyRows of csrc/quant_linear/cuda/params.h
_RUN = 32  # codes of a row that a lane holds: they share a scale
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_RANK = 256
_MAX_EXTENT = 2**24  # row strides of lora_linear's GEMM
_MAX_BLOCKS = 2**31 - 1024


def supports(problem: QuantLinearProblem) -> tuple[bool, str]:
    """Can the kernels run `problem`, at whatever speed. M = 0: dequantization alone."""
    if problem.device != "cuda":
        return False, f"the tensors are on {problem.device}, the kernels work on cuda tensors"
    if problem.dtype not in _DTYPES:
        return False, f"dtype {problem.dtype} is not supported; float32, bfloat16 and float16 are"
    if problem.M > 0 and problem.dtype == torch.float32:
        return False, "dtype torch.float32 is not supported for x; bfloat16 and float16 are"
    if problem.K == 0 or problem.N == 0:
        return False, "in_features or out_features is 0"
    if problem.rank > _MAX_RANK:
        return False, f"rank {problem.rank} is too large; at most {_MAX_RANK}"
    if max(problem.K, problem.N) > _MAX_EXTENT or problem.M > _MAX_BLOCKS:
        return False, f"in_features or out_features is larger than {_MAX_EXTENT}"
    if problem.layout == formats.FLAT and problem.block_size < _RUN:
        return False, f"block size {problem.block_size} is not supported; at least {_RUN} is"
    reason = backend.device_reason() or _library_reason()
    if reason or problem.M == 0:
        return not reason, reason or "CUDA C++ kernels, dequantization in one launch"
    why = skinny_reason(problem.spec, problem.M)
    rest = "lora_linear's kernels" if problem.rank else "a library GEMM"
    return True, f"CUDA C++ kernels, {f'dequantization and {rest} ({why})' if why else 'packed'}"


def _library_reason() -> str:
    library, reason = backend.load()
    if library is None:
        return reason
    if hasattr(library, "quant_linear_dgrad"):
        return ""
    return f"{backend.path().name} predates quant_linear's packed dX; build it again"


def skinny_reason(spec: QuantSpec, rows: int) -> str:
    """Why the kernel that reads packed weights does not serve these rows of x; "" where it does."""
    if rows > SKINNY_ROWS:
        return f"more than {SKINNY_ROWS} rows"
    if spec.columns % _RUN:
        return f"in_features {spec.columns} is no multiple of {_RUN}"
    if spec.act_order:
        return "act-order groups"
    shared = {formats.GPTQ, formats.GPTQ_V1, formats.AWQ, formats.FP8_BLOCK, formats.FLAT}
    if spec.layout in shared and spec.block_size < spec.columns and spec.block_size % _RUN:
        return f"groups of {spec.block_size}, no multiple of {_RUN}"
    return ""


def _operator(name: str) -> Any:
    library, reason = backend.load()
    assert library is not None, reason
    return getattr(library, name)


def _weight(parts: tuple[Tensor, ...], spec: QuantSpec) -> tuple[Any, ...]:
    """What an operator takes for a weight."""
    return (
        list(parts), spec.layout, spec.rows, spec.columns, spec.block_size, spec.nested_block_size,
        formats.INT8_RECIPROCAL,
    )  # fmt: skip


def _aligned_weight(parts: tuple[Tensor, ...], spec: QuantSpec) -> tuple[Any, ...]:
    """The same with codes at a multiple of 16 bytes."""
    codes = parts[0] if parts[0].data_ptr() % 16 == 0 else parts[0].clone()
    return _weight((codes, *parts[1:]), spec)


def _adapter(t: Tensor) -> Tensor:
    """The kernels read fp32 and 16-bit adapters and biases; fp64 is rounded to fp32 first."""
    return t if t.dtype in _DTYPES else t.to(torch.float32)


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[float, int, Tensor | None]:
    """(1 / P(keep), smallest draw that is kept, seed)."""
    if dropout_p == 0.0 or seed is None:
        return 1.0, 0, None
    return keep_scale(dropout_p), threshold(dropout_p), seed


def dequantize(parts: tuple[Tensor, ...], spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """W of `spec.shape` in `dtype`: the bits of reference.py."""
    if spec.numel == 0:
        return torch.empty(spec.shape, dtype=dtype, device=parts[0].device)
    w = _operator("quant_dequantize")(*_weight(parts, spec), _DTYPES[dtype])
    return w.view(spec.shape)


def quantize(w: Tensor, spec: QuantSpec) -> tuple[Tensor, ...] | None:
    """The parts of a finite `w`, the bytes of reference.py on that device; None for a format
    without a kernel (int4, fp8) and for fp64."""
    if w.dtype not in _DTYPES or w.numel() == 0:
        return None
    if spec.layout == formats.INT8_ROW:
        return tuple(_operator("quant_quantize_rows")(w.reshape(spec.rows, spec.columns)))
    if spec.layout != formats.FLAT:
        return None
    table = formats.code_table(spec.format)
    values, nibbles = torch.sort(table, stable=True)
    packed, absmax = _operator("quant_quantize_flat")(
        w, spec.block_size, values.tolist(), nibbles.tolist(), formats.MIN_ABSMAX
    )
    code = table.to(w.device, copy=True)
    if not spec.nested_block_size:
        return packed, absmax, code
    nested_code = formats.dynamic_map().to(w.device, copy=True)
    offset = absmax.mean()
    codes, nested_absmax = _operator("quant_quantize_nested")(
        absmax, spec.nested_block_size, nested_code, offset, formats.MIN_ABSMAX
    )
    return packed, codes, code, nested_absmax, nested_code, offset


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
    bias = None if bias is None else _adapter(bias)
    adapter = lora_a is not None and lora_b is not None
    a = _adapter(lora_a) if lora_a is not None else None
    b = _adapter(lora_b) if lora_b is not None else None
    drop = _dropout(dropout_p, seed)
    if not skinny_reason(spec, x.shape[0]):
        weight = _aligned_weight(parts, spec)
        return _operator("quant_linear_fwd")(x, *weight, bias, a, b, scaling, *drop)
    w = dequantize(parts, spec, x.dtype)
    if not adapter:
        y = F.linear(x, w, None if bias is None else bias.to(x.dtype))
        return y, x.new_empty(x.shape[0], 0)
    ys, s = _operator("lora_linear_fwd")(x, [w], [a], [b], [bias], [scaling], *drop, "auto")
    return ys[0], s


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
    none = dy.new_empty(0)
    adapter = lora_a is not None and lora_b is not None
    dx, drop = none, _dropout(dropout_p, seed)
    if need_dx and not skinny_reason(spec, dy.shape[0]):
        a = _adapter(lora_a) if lora_a is not None and adapter else None
        b = _adapter(lora_b) if lora_b is not None and adapter else None
        weight = _aligned_weight(parts, spec)
        dx = _operator("quant_linear_dgrad")(dy, *weight, a, b, scaling, *drop)
        need_dx = False
    elif need_dx and not adapter:
        dx, need_dx = dy @ dequantize(parts, spec, dy.dtype), False
    if lora_a is None or lora_b is None or x is None or not (need_dx or need_da or need_db):
        return dx, none, none
    if need_dx:
        w = dequantize(parts, spec, dy.dtype)
    else:
        w = dy.new_empty(spec.rows, spec.columns)  # the operator reads its shape alone
    made, das, dbs = _operator("lora_linear_bwd")(
        [dy], x, [w], [_adapter(lora_a)], [_adapter(lora_b)], s, [scaling],
        *drop, need_dx, need_da, need_db, "auto",
    )  # fmt: skip
    da = das[0].to(lora_a.dtype) if need_da else none
    db = dbs[0].to(lora_b.dtype) if need_db else none
    return made if need_dx else dx, da, db
