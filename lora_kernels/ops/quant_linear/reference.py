"""Oracle of the quantized formats and of the linear layer on them, in plain PyTorch.

Formulas of the formats: formats.py. Of the layer, with W the dequantized weight in the dtype of X:
the same as lora_linear, where W is frozen.

    S  = (X * D / P(keep)) A^T            Y  = X W^T + bias + s S B^T
    dS = s dY B                           dX = dY W + (dS A) * D / P(keep)
    dA = dS^T (X * D / P(keep))           dB = s dY^T S
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops._philox import drop, keep_scale
from lora_kernels.ops.quant_linear import formats
from lora_kernels.ops.quant_linear.formats import QuantSpec


def quantize(
    w: Tensor, spec: QuantSpec, scales_dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """The parts of `w`, rounded to the nearest code; statistics in fp32.

    `scales_dtype` is for int4; None takes :func:`int4_scales_dtype`.
    """
    w = w.detach().float()
    if spec.layout == formats.FLAT:
        return _quantize_flat(w, spec)
    rows = w.reshape(spec.rows, spec.columns)
    if spec.layout == formats.INT8_ROW:
        scale = rows.abs().amax(1)
        factor = 127.0 / torch.where(scale == 0, 1.0, scale)[:, None]
        q = torch.round(rows * factor.clamp(max=torch.finfo(torch.float32).max))
        return q.clamp(-127, 127).to(torch.int8), scale
    if spec.format == "int4":
        return _quantize_int4(rows, spec, scales_dtype or int4_scales_dtype(rows, spec))
    return _quantize_fp8(rows, spec)


def _nearest(x: Tensor, code: Tensor) -> Tensor:
    """Index of the nearest entry of `code`, which need not be sorted; ties go down."""
    values, order = torch.sort(code, stable=True)
    return order[torch.bucketize(x, (values[:-1] + values[1:]) / 2)]


def _blocks(flat: Tensor, size: int) -> Tensor:
    """[ceil(n / size), size], the tail filled with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def _quantize_flat(w: Tensor, spec: QuantSpec) -> tuple[Tensor, ...]:
    code = formats.code_table(spec.format).to(w.device, copy=True)
    blocks = _blocks(w.reshape(-1), spec.block_size)
    absmax = blocks.abs().amax(1)
    limited = absmax.clamp(min=formats.MIN_ABSMAX)[:, None]
    scaled = blocks * (1.0 / limited)
    if spec.numel % spec.block_size:  # bitsandbytes divides the elements of a last, partial block
        scaled[-1] = blocks[-1] / limited[-1]
    even = -(-spec.numel // 2) * 2
    nibbles = _nearest(_take(scaled.reshape(-1), even), code).to(torch.uint8)
    packed = nibbles[0::2] << 4 | nibbles[1::2]
    if not spec.nested_block_size:
        return packed, absmax, code
    codes, nested_absmax, nested_code, offset = nest(absmax, spec.nested_block_size)
    return packed, codes, code, nested_absmax, nested_code, offset


def nest(absmax: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of the statistics: (u8 codes, nested_absmax, nested_code, offset)."""
    code = formats.dynamic_map().to(absmax.device, copy=True)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    blocks = _blocks(absmax - offset, size)
    nested_absmax = blocks.abs().amax(1)
    scaled = blocks * (1.0 / nested_absmax.clamp(min=formats.MIN_ABSMAX))[:, None]
    codes = _nearest(scaled.reshape(-1)[: absmax.numel()], code).to(torch.uint8)
    return codes, nested_absmax, code, offset


def _take(flat: Tensor, n: int) -> Tensor:
    return torch.nn.functional.pad(flat, (0, max(0, n - flat.numel())))[:n]


def _groups(rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Groups [N, G, block_size] and the smallest and largest of each and zero."""
    n, k = rows.shape
    padded = torch.nn.functional.pad(rows, (0, spec.groups * spec.block_size - k))
    groups = padded.view(n, spec.groups, spec.block_size)
    return groups, groups.amin(2).clamp(max=0.0), groups.amax(2).clamp(min=0.0)


def int4_scales_dtype(rows: Tensor, spec: QuantSpec) -> torch.dtype:
    """float16, as GPTQ and AWQ have it, unless a scale is out of its normal range."""
    _, low, high = _groups(rows.float(), spec)
    scale, half = (high - low) / 15.0, torch.finfo(torch.float16)
    fits = (scale == 0) | ((scale >= half.tiny) & (scale <= half.max))
    return torch.float16 if bool(fits.all()) else torch.float32


def _quantize_int4(rows: Tensor, spec: QuantSpec, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Asymmetric rounding to nearest, per group of `block_size` along k."""
    n, k = rows.shape
    groups, low, high = _groups(rows, spec)
    # The stored scale, already rounded, decides the codes.
    stored = ((high - low) / 15.0).to(dtype)
    divisor = torch.where(stored == 0, 1.0, stored.float())
    zero = torch.round(-low / divisor).clamp(0, 15)
    q = (torch.round(groups / divisor[..., None]) + zero[..., None]).clamp(0, 15)
    codes = q.view(n, -1)[:, :k].t().to(torch.int32)  # [K, N]
    zeros, scales = zero.t().to(torch.int32), stored.t().contiguous()
    if spec.layout == formats.AWQ:
        order = torch.tensor(formats.AWQ_ORDER, device=rows.device)
        return _pack(codes, order), _pack(zeros, order), scales
    g_idx = torch.arange(k, device=rows.device, dtype=torch.int32) // spec.block_size
    return _pack(codes.t()).t().contiguous(), _pack(zeros), scales, g_idx


def _pack(codes: Tensor, order: Tensor | None = None) -> Tensor:
    """Eight int4 of the last axis in one int32: bits 4i hold element order[i]."""
    eights = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % formats.PER_INT32))
    eights = eights.reshape(*codes.shape[:-1], -1, formats.PER_INT32)
    if order is not None:
        eights = eights[..., order]
    shifts = 4 * torch.arange(formats.PER_INT32, device=codes.device)
    total = (eights.to(torch.int64) << shifts).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def unpack(packed: Tensor, order: tuple[int, ...] | None = None) -> Tensor:
    """int4 codes as int32, eight along the last axis for each int32 (inverse of packing)."""
    shifts = 4 * torch.arange(formats.PER_INT32, device=packed.device, dtype=torch.int32)
    codes = (packed[..., None] >> shifts) & 0xF
    if order is not None:
        inverse = torch.argsort(torch.tensor(order, device=packed.device))
        codes = codes[..., inverse]
    return codes.flatten(-2)


def _quantize_fp8(rows: Tensor, spec: QuantSpec) -> tuple[Tensor, ...]:
    n, k = rows.shape
    b = spec.block_size
    if spec.layout == formats.FP8_TENSOR:
        absmax = rows.abs().amax() if rows.numel() else rows.new_zeros(())
    elif spec.layout == formats.FP8_ROW:
        absmax = rows.abs().amax(1)
    else:
        tiles = torch.nn.functional.pad(rows.abs(), (0, -k % b, 0, -n % b))
        absmax = tiles.view(-(-n // b), b, -(-k // b), b).amax((1, 3))
    tiny = torch.finfo(torch.float32).tiny
    scale = torch.where(absmax == 0, 1.0, (absmax / formats.FP8_MAX).clamp(min=tiny))
    q = rows / _per_element(scale, spec)
    return q.clamp(-formats.FP8_MAX, formats.FP8_MAX).to(torch.float8_e4m3fn), scale


def _per_element(scale: Tensor, spec: QuantSpec) -> Tensor:
    """fp8 scales in a shape that broadcasts over [N, K]."""
    if spec.layout == formats.FP8_ROW:
        return scale[:, None]
    if spec.layout == formats.FP8_BLOCK:
        b = spec.block_size
        wide = scale.repeat_interleave(b, 0).repeat_interleave(b, 1)
        return wide[: spec.rows, : spec.columns]
    return scale


def absmax(parts: tuple[Tensor, ...], spec: QuantSpec) -> Tensor:
    """fp32 [blocks] of the flat layout, nested statistics undone."""
    if not spec.nested_block_size:
        return parts[1]
    _, codes, _, nested_absmax, nested_code, offset = parts
    scale = nested_absmax.repeat_interleave(spec.nested_block_size)[: codes.numel()]
    return nested_code[codes.long()] * scale + offset


def dequantize(parts: tuple[Tensor, ...], spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """W of `spec.shape` in `dtype`."""
    if spec.layout == formats.FLAT:
        packed, code = parts[0], parts[2]
        nibbles = torch.stack([packed >> 4, packed & 0xF], 1).reshape(-1)[: spec.numel]
        scale = absmax(parts, spec).repeat_interleave(spec.block_size)[: spec.numel]
        w = code[nibbles.long()] * scale
    elif spec.layout == formats.INT8_ROW:
        w = parts[0].float() * parts[1][:, None] * formats.INT8_RECIPROCAL
    elif spec.format == "int4":
        w = _dequantize_int4(parts, spec)
    else:
        w = parts[0].float() * _per_element(parts[1], spec)
    return w.to(dtype).reshape(spec.shape).contiguous()


def _dequantize_int4(parts: tuple[Tensor, ...], spec: QuantSpec) -> Tensor:
    n, k = spec.rows, spec.columns
    qweight, qzeros, scales = parts[:3]
    if spec.layout == formats.AWQ:
        codes = unpack(qweight, formats.AWQ_ORDER)[:, :n]
        zeros = unpack(qzeros, formats.AWQ_ORDER)[:, :n]
        group = torch.arange(k, device=qweight.device) // spec.block_size
    else:
        codes = unpack(qweight.t()).t()[:k]
        zeros = unpack(qzeros)[:, :n] + (1 if spec.layout == formats.GPTQ_V1 else 0)
        group = parts[3].long()
    return ((codes - zeros[group]).float() * scales.float()[group]).t()


def _dropped(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """X * D / P(keep)."""
    if dropout_p == 0.0 or seed is None:
        return x
    return drop(x, seed, dropout_p) * keep_scale(dropout_p)


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
    """Y [M, N] and S [M, r]; without an adapter S is [M, 0]."""
    y = x @ dequantize(parts, spec, x.dtype).t()
    s = x.new_empty(x.shape[0], 0)
    if lora_a is not None and lora_b is not None:
        s = _dropped(x, dropout_p, seed) @ lora_a.to(x.dtype).t()
        y = y + scaling * (s @ lora_b.to(x.dtype).t())
    return y if bias is None else y + bias.to(x.dtype), s


def quant_linear_bwd(
    dy: Tensor,
    x: Tensor,
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
    if lora_a is not None and lora_b is not None:
        ds = scaling * (dy @ lora_b.to(dy.dtype))
        if need_dx:
            dx = dx + _dropped(ds @ lora_a.to(dy.dtype), dropout_p, seed)
        if need_da:
            da = (ds.t() @ _dropped(x, dropout_p, seed)).to(lora_a.dtype)
        if need_db:
            db = (scaling * (dy.t() @ s)).to(lora_b.dtype)
    return dx, da, db
