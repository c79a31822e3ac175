"""quant_linear on Triton kernels: which launches, with which tiles, into which buffers.

Dispatch calls :func:`supports`, :func:`dequantize`, :func:`quant_linear_fwd` and
:func:`quant_linear_bwd`, with the signatures of cpu.py. Rows and adapters may have any strides.
Nothing waits for the device, so the calls can be captured in a graph once their kernels are
compiled (the first call compiles).

    up to MOST_ROWS rows    products on the packed weight and, for an adapter or a split sum,
                            finish; the same two launches give dX. dA and dB as lora_linear has them
    more rows               dequantize, one launch, then lora_linear on that weight (on a GPU the
                            backend that its own evidence prefers), or without an adapter a GEMM of
                            the library

CPU tensors run in Triton's interpreter when TRITON_INTERPRET=1 was set before the first launch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels._backends import triton as backend
from lora_kernels.ops._philox import keep_scale, threshold
from lora_kernels.ops.quant_linear import configs, formats
from lora_kernels.ops.quant_linear.formats import FLOATS, QuantSpec
from lora_kernels.ops.quant_linear.problem import QuantLinearProblem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_RANK = 256
_MOST_COLUMNS = 32 * 65535  # the second axis of a grid of tiles
_FINISH = (16, 64)  # rows and columns of a tile


def supports(problem: QuantLinearProblem) -> tuple[bool, str]:
    """Can the kernels run `problem`, at whatever speed; the reason is for people."""
    able, reason = backend.usable(problem.device, None, "x" if problem.M else "q")
    if not able:
        return False, reason
    dtypes = FLOATS if problem.M == 0 else _DTYPES
    if problem.dtype not in dtypes:
        return False, f"dtype {problem.dtype} is not supported; float32, bfloat16 and float16 are"
    if problem.rank > _MAX_RANK:
        return False, f"rank {problem.rank} is too large; at most {_MAX_RANK}"
    if problem.K == 0 or problem.N == 0:
        return False, "in_features or out_features is 0"
    if max(problem.M, problem.K, problem.N) >= 2**31:
        return False, "an extent of 2**31 or more is not supported"
    if problem.layout != formats.FLAT and problem.K > _MOST_COLUMNS:
        return (
            False,
            f"in_features {problem.K} is too large; at most {_MOST_COLUMNS} in this layout",
        )
    return True, reason


class _Kernels(NamedTuple):
    products: Any
    finish: Any
    dequantize_flat: Any
    dequantize_rows: Any
    quantize_flat: Any
    quantize_nested: Any
    quantize_rows: Any


@functools.cache
def _kernels() -> _Kernels:
    from lora_kernels.ops.quant_linear import triton_dequantize, triton_gemm, triton_quantize

    return _Kernels(
        triton_gemm.products,
        triton_gemm.finish,
        triton_dequantize.dequantize_flat,
        triton_dequantize.dequantize_rows,
        triton_quantize.quantize_flat,
        triton_quantize.quantize_nested,
        triton_quantize.quantize_rows,
    )


@functools.cache
def _target(device_type: str, index: int) -> configs.Target:
    if device_type == "cpu":  # the interpreter takes the choices of a large device
        return configs.Target("sm_90", 132, 232448)
    name, processors, shared = backend.architecture(index)
    return configs.Target(name, processors, shared or 65536)


def target_of(x: Tensor) -> configs.Target:
    return _target(x.device.type, x.device.index or 0)


def _raw(parts: tuple[Tensor, ...], spec: QuantSpec) -> tuple[Tensor, ...]:
    """The parts as the kernels take them: fp8 as bytes."""
    return (parts[0].view(torch.uint8), *parts[1:]) if spec.format == "fp8" else tuple(parts)


def _format(spec: QuantSpec, columns: int) -> dict[str, Any]:
    """Constants of a kernel that decodes tiles of `columns` columns."""
    blocked = spec.layout == formats.FP8_BLOCK or spec.format in ("nf4", "fp4", "int4")
    return {
        "LAYOUT": spec.layout, "BLOCK": spec.block_size if blocked else 0,
        "ACT_ORDER": spec.act_order, "FAST": configs.is_fast(spec, columns),
    }  # fmt: skip


def dequantize(parts: tuple[Tensor, ...], spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """W of `spec.shape` in `dtype`, contiguous."""
    out = torch.empty(spec.shape, dtype=dtype, device=parts[0].device)
    n = spec.numel
    if n == 0:
        return out
    with backend.on_device(out), backend.arithmetic(_kernels().products):
        if spec.layout == formats.FLAT:
            threads = configs.dequantize_flat(spec, dtype.itemsize, target_of(out)).threads
            _kernels().dequantize_flat[(-(-n // (8 * threads)),)](
                tuple(parts), out, n, BLOCK=spec.block_size, NESTED=spec.nested_block_size,
                EVEN=n % 8 == 0, T=threads, num_warps=threads // 32, enable_fp_fusion=False,
            )  # fmt: skip
            return out
        c = configs.dequantize(spec, dtype.itemsize, target_of(out))
        _kernels().dequantize_rows[(-(-spec.rows // c.rows), -(-spec.columns // c.columns))](
            _raw(parts, spec), out, spec.rows, spec.columns, BN=c.rows, BK=c.columns,
            num_warps=c.num_warps, enable_fp_fusion=False, **_format(spec, c.columns),
        )  # fmt: skip
    return out


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
    adapter = None
    if lora_a is not None and lora_b is not None:
        adapter = _Adapter(lora_a, lora_b.t(), keep_scale(dropout_p), float(scaling))
    if x.shape[0] <= configs.MOST_ROWS:
        return _packed_product(x, parts, spec, bias, adapter, dropout_p, seed, backward=False)
    w = dequantize(parts, spec, x.dtype)
    if lora_a is None or lora_b is None:
        return F.linear(x, w, None if bias is None else bias.to(x.dtype)), x.new_empty(len(x), 0)
    ys, s = torch.ops.lora_kernels.lora_linear_fwd(
        x, [w], [lora_a], [lora_b], [bias], [float(scaling)], dropout_p, seed, _dense_backend(x)
    )
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
    dx, few = dy.new_empty(0), dy.shape[0] <= configs.MOST_ROWS
    if lora_a is None or lora_b is None or x is None:
        if need_dx and few:
            dx, _ = _packed_product(dy, parts, spec, None, None, 0.0, None, backward=True)
        elif need_dx:
            dx = dy @ dequantize(parts, spec, dy.dtype)
        return dx, dy.new_empty(0), dy.new_empty(0)
    if need_dx and few:
        scale = keep_scale(dropout_p) * float(scaling)
        adapter = _Adapter(lora_b.t(), lora_a, scale, 1.0)
        dx, _ = _packed_product(dy, parts, spec, None, adapter, dropout_p, seed, backward=True)
        need_dx = False
    if not (need_dx or need_da or need_db):
        return dx, dy.new_empty(0), dy.new_empty(0)
    # Nothing reads the weight where dX is not asked for.
    w = dequantize(parts, spec, dy.dtype) if need_dx else dy.new_empty(1).expand(spec.shape)
    made, das, dbs = torch.ops.lora_kernels.lora_linear_bwd(
        [dy], x, [w], [lora_a], [lora_b], s, [float(scaling)], dropout_p, seed,
        need_dx, need_da, need_db, _dense_backend(x),
    )  # fmt: skip
    return (
        made if need_dx else dx,
        das[0] if need_da else dy.new_empty(0),
        dbs[0] if need_db else dy.new_empty(0),
    )


def _dense_backend(x: Tensor) -> str:
    """Of lora_linear on a dequantized weight."""
    return "auto" if x.is_cuda else "triton"


class _Adapter(NamedTuple):
    """U = u_scale mask(Z) left^T and the update scale U right, see triton_gemm.py."""

    left: Tensor
    right: Tensor
    u_scale: float
    scale: float


def _in_vectors(z: Tensor) -> bool:
    """Rows of whole 16 bytes at an aligned address."""
    row = z.stride(0) * z.element_size()
    return z.stride(1) == 1 and row % 16 == 0 and z.data_ptr() % 16 == 0


def _packed_product(
    z: Tensor,
    parts: tuple[Tensor, ...],
    spec: QuantSpec,
    bias: Tensor | None,
    adapter: _Adapter | None,
    dropout_p: float,
    seed: Tensor | None,
    *,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """C [M, P] and U [M, rank]: Y and S, or dX and dS."""
    m, where = z.shape[0], target_of(z)
    p, q = (spec.columns, spec.rows) if backward else (spec.rows, spec.columns)
    w = configs.walk(spec, z.element_size(), backward, where)
    constants = _format(spec, w.held if backward else w.step)
    c = configs.launch(
        spec, m, z.element_size(), backward, constants["FAST"], _in_vectors(z), where
    )
    rank = 0 if adapter is None else adapter.left.shape[0]
    limit = threshold(dropout_p) if seed is not None and rank else 0
    steps = -(-q // w.step)
    per_split = -(-steps // (w.splits * configs.AHEAD)) * configs.AHEAD
    splits = -(-steps // per_split)
    out, u = z.new_empty(m, p), z.new_empty(m, rank)
    whole = splits == 1 and adapter is None
    target = out if whole else z.new_empty(splits, m, p + rank, dtype=torch.float32)
    left, right = (out, out) if adapter is None else (adapter.left, adapter.right)
    shared: dict[str, Any] = {"PRECISION": backend.precision(z.dtype)}
    if where.amd:
        shared["matrix_instr_nonkdim"] = 16  # one instruction whatever the tile
    bias_stride = 0 if bias is None else bias.stride(0)
    drawn = seed if seed is not None and limit else z
    with backend.on_device(z), backend.arithmetic(_kernels().products):
        _kernels().products[
            (-(-p // w.held) + -(-rank // w.held), -(-m // c.rows), splits)
        ](
            z, _raw(parts, spec), left, z if bias is None else bias, target, drawn,
            m, spec.rows, spec.columns, rank, z.stride(0), z.stride(1),
            left.stride(0), left.stride(1), bias_stride, limit, per_split,
            BH=w.held, BM=c.rows, BQ=w.step, AHEAD=c.ahead, BACKWARD=backward, PARTIAL=not whole,
            HAS_BIAS=bias is not None, DROPOUT=limit > 0, NESTED=spec.nested_block_size,
            num_warps=c.num_warps, num_stages=3,
            enable_fp_fusion=False,
            **constants, **shared,
        )  # fmt: skip
        if whole:
            return out, u
        rows, columns = _FINISH
        _kernels().finish[(-(-p // columns), -(-m // rows))](
            target, u, right, z if bias is None else bias, out, drawn, m, p, rank,
            right.stride(0), right.stride(1), bias_stride, splits,
            1.0 if adapter is None else adapter.u_scale,
            1.0 if adapter is None else adapter.scale, limit,
            BM=rows, BP=columns, RB=configs.RANK_BLOCK, HAS_BIAS=bias is not None,
            DROPOUT=limit > 0 and backward, num_warps=4, num_stages=2, **shared,
        )  # fmt: skip
    return out, u


@functools.cache
def _nearest(fmt: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Middles between neighbouring codes, and the code of each interval."""
    code = formats.dynamic_map() if fmt == "nested" else formats.code_table(fmt)
    values, order = torch.sort(code, stable=True)
    middles = (values[:-1] + values[1:]) / 2
    return middles.to(device), order.to(device=device, dtype=torch.uint8)


def quantize(w: Tensor, spec: QuantSpec) -> tuple[Tensor, ...] | None:
    """The parts of `w`, the bytes that reference.py gives; None for a format without a kernel."""
    rows_of = {formats.INT8_ROW: torch.int8, formats.FP8_ROW: torch.uint8}
    if w.numel() == 0 or spec.layout not in (formats.FLAT, *rows_of):
        return None
    w = w.detach().contiguous()
    with backend.on_device(w), backend.arithmetic(_kernels().products):
        if spec.layout == formats.FLAT:
            return _quantize_flat(w, spec)
        fp8 = spec.layout == formats.FP8_ROW
        packed = w.new_empty(spec.rows, spec.columns, dtype=rows_of[spec.layout])
        scale = w.new_empty(spec.rows, dtype=torch.float32)
        _kernels().quantize_rows[(spec.rows,)](
            w, packed, scale, spec.rows, spec.columns, formats.FP8_MAX if fp8 else 127.0,
            torch.finfo(torch.float32).tiny, FP8=fp8, BK=1024, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return packed.view(torch.float8_e4m3fn) if fp8 else packed, scale


def _quantize_flat(w: Tensor, spec: QuantSpec) -> tuple[Tensor, ...]:
    n, size, blocks = spec.numel, spec.block_size, spec.blocks
    middles, order = _nearest(spec.format, w.device)
    packed = w.new_empty(-(-n // 2), dtype=torch.uint8)
    absmax = w.new_empty(blocks, dtype=torch.float32)
    together = max(1, 4096 // size)
    _kernels().quantize_flat[(-(-blocks // together),)](
        w, middles, order, packed, absmax, n, formats.MIN_ABSMAX, BLOCK=size, G=together,
        PARTIAL=n % size != 0, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    code = formats.code_table(spec.format).to(w.device, copy=True)
    if not spec.nested_block_size:
        return packed, absmax, code
    nested = spec.nested_block_size
    middles, _ = _nearest("nested", w.device)
    offset = absmax.mean()
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    nested_absmax = absmax.new_empty(-(-blocks // nested))
    _kernels().quantize_nested[(-(-blocks // nested),)](
        absmax, middles, offset, codes, nested_absmax, blocks, formats.MIN_ABSMAX, B=nested,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    nested_code = formats.dynamic_map().to(w.device, copy=True)
    return packed, codes, code, nested_absmax, nested_code, offset
