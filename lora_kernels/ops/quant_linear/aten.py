"""The quantized formats over library calls: the floor that every own kernel has to beat.

Dequantization goes once over the packed data, in chunks whose temporaries stay in cache, and writes
W in its own dtype; the linear layer is that followed by library GEMMs, with the low-rank update
accumulated into Y and dX by `addmm_`. The bytes of W equal those of reference.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.ops._philox import drop, keep_scale
from lora_kernels.ops.quant_linear import formats
from lora_kernels.ops.quant_linear.formats import QuantSpec

# Elements of W per chunk: the fp32 temporaries of 2**18 take one megabyte each.
_CHUNK = {"cpu": 2**18}
_CHUNK_ELSEWHERE = 2**26
# Rows converted at a time when dA or dB is accumulated in fp32 from a low-precision operand.
_ROWS = 512


def supports(problem: object) -> tuple[bool, str]:
    return True, "library GEMMs"


def _chunk(device: torch.device, unit: int) -> int:
    """Chunk length in elements, a multiple of `unit`."""
    return max(1, _CHUNK.get(device.type, _CHUNK_ELSEWHERE) // unit) * unit


def dequantize(parts: tuple[Tensor, ...], spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """W of `spec.shape` in `dtype`, contiguous."""
    out = torch.empty(spec.shape, dtype=dtype, device=parts[0].device)
    if spec.numel == 0:
        return out
    if spec.layout == formats.FLAT:
        _flat(parts, spec, out.view(-1))
    elif spec.format == "int4":
        _int4(parts, spec, out.view(spec.rows, spec.columns))
    else:
        _scaled_rows(parts, spec, out.view(spec.rows, spec.columns))
    return out


def _absmax(parts: tuple[Tensor, ...], spec: QuantSpec) -> Tensor:
    if not spec.nested_block_size:
        return parts[1]
    _, codes, _, nested_absmax, nested_code, offset = parts
    values = nested_code.index_select(0, codes.int())
    size = spec.nested_block_size
    whole = values.numel() // size * size
    values[:whole].view(-1, size).mul_(nested_absmax[: whole // size, None])
    values[whole:].mul_(nested_absmax[-1])
    return values.add_(offset)


def _flat(parts: tuple[Tensor, ...], spec: QuantSpec, out: Tensor) -> None:
    """One lookup per byte gives both of its elements."""
    packed, code = parts[0], parts[2]
    absmax, size = _absmax(parts, spec), spec.block_size
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)  # [256, (high, low)]
    step = _chunk(out.device, size)
    for begin in range(0, spec.numel, step):
        end = min(begin + step, spec.numel)
        values = pairs.index_select(0, packed[begin // 2 : (end + 1) // 2].int()).view(-1)
        first, whole = begin // size, (end - begin) // size
        blocks = values[: whole * size].view(whole, size)
        blocks.mul_(absmax[first : first + whole, None])
        if whole * size < end - begin:
            values[whole * size :].mul_(absmax[-1])
        out[begin:end].copy_(values[: end - begin])


def _scaled_rows(parts: tuple[Tensor, ...], spec: QuantSpec, out: Tensor) -> None:
    """int8 and fp8: a conversion and one or two products."""
    packed, scale = parts
    step = max(1, _chunk(out.device, 1) // max(1, spec.columns))
    if spec.layout == formats.FP8_BLOCK:
        b = spec.block_size
        step = max(1, step // b) * b
    for begin in range(0, spec.rows, step):
        rows = slice(begin, begin + step)
        values = packed[rows].float()
        if spec.layout == formats.FP8_TENSOR:
            values.mul_(scale)
        elif spec.layout == formats.FP8_BLOCK:
            tiles = scale[begin // b : -(-(begin + step) // b)]
            wide = tiles.repeat_interleave(b, 1)[:, : spec.columns].repeat_interleave(b, 0)
            values.mul_(wide[: values.shape[0]])
        else:
            values.mul_(scale[rows, None])
            if spec.layout == formats.INT8_ROW:
                values.mul_(formats.INT8_RECIPROCAL)
        out[rows].copy_(values)


def _unpack(packed: Tensor, order: tuple[int, ...]) -> Tensor:
    """Eight int4 codes along the last axis for each int32; element order[i] is at bits 4i."""
    shifts = [0] * formats.PER_INT32
    for i, element in enumerate(order):
        shifts[element] = 4 * i
    wide = packed[..., None] >> torch.tensor(shifts, dtype=torch.int32, device=packed.device)
    return wide.bitwise_and_(0xF).flatten(-2)


def _int4(parts: tuple[Tensor, ...], spec: QuantSpec, out: Tensor) -> None:
    """Chunks of whole packed rows of k, written as columns of W."""
    n, k, size = spec.rows, spec.columns, spec.block_size
    qweight, qzeros, scales = parts[:3]
    in_order = tuple(range(formats.PER_INT32))
    awq = spec.layout == formats.AWQ
    zeros = _unpack(qzeros, formats.AWQ_ORDER if awq else in_order)[:, :n]
    if spec.layout == formats.GPTQ_V1:
        zeros = zeros + 1
    step = max(1, _chunk(out.device, 1) // max(1, n) // formats.PER_INT32) * formats.PER_INT32
    for begin in range(0, k, step):
        end = min(begin + step, k)
        if awq:
            codes = _unpack(qweight[begin:end], formats.AWQ_ORDER)[:, :n]
        else:
            packed = qweight[begin // formats.PER_INT32 : -(-end // formats.PER_INT32)]
            codes = _unpack(packed.t(), in_order).t()[: end - begin]
        if len(parts) > 3:
            group = parts[3][begin:end]
        else:
            group = torch.arange(begin, end, dtype=torch.int32, device=out.device) // size
        values = (codes - zeros.index_select(0, group)).float()
        values.mul_(scales.index_select(0, group))
        out[:, begin:end].copy_(values.t())


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
    w = dequantize(parts, spec, x.dtype)
    y = F.linear(x, w, None if bias is None else bias.to(x.dtype))
    if lora_a is None or lora_b is None:
        return y, x.new_empty(x.shape[0], 0)
    if seed is None or dropout_p == 0.0:
        s = x @ lora_a.to(x.dtype).t()
    else:
        s = (drop(x, seed, dropout_p) @ lora_a.to(x.dtype).t()).mul_(keep_scale(dropout_p))
    y.addmm_(s, lora_b.to(x.dtype).t(), alpha=scaling)
    return y, s


def _mm_accumulate(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """left^T right, accumulated and returned in `out_dtype` where it is wider."""
    if out_dtype.itemsize <= left.dtype.itemsize:
        return (left.t() @ right).to(out_dtype)
    if left.is_cuda and out_dtype == torch.float32:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    total = left.new_zeros(left.shape[1], right.shape[1], dtype=out_dtype)
    for i in range(0, left.shape[0], _ROWS):
        total.addmm_(left[i : i + _ROWS].to(out_dtype).t(), right[i : i + _ROWS].to(out_dtype))
    return total


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
    dx = dy @ dequantize(parts, spec, dy.dtype) if need_dx else dy.new_empty(0)
    da, db = dy.new_empty(0), dy.new_empty(0)
    if lora_a is None or lora_b is None or x is None:
        return dx, da, db
    dropping = seed is not None and dropout_p > 0.0
    if need_dx or need_da:
        rescale = keep_scale(dropout_p) if dropping else 1.0
        ds = (dy @ lora_b.to(dy.dtype)).mul_(scaling * rescale)
    if need_dx:
        if dropping:
            assert seed is not None
            dx += drop(ds @ lora_a.to(dy.dtype), seed, dropout_p)
        else:
            dx.addmm_(ds, lora_a.to(dy.dtype))
    if need_da:
        dropped = drop(x, seed, dropout_p) if seed is not None and dropping else x
        da = _mm_accumulate(ds, dropped, lora_a.dtype)
    if need_db:
        db = _mm_accumulate(dy, s, lora_b.dtype).mul_(scaling)
    return dx, da, db
