"""Quantization in pieces: the formulas of reference.py on chunks, to keep temporaries small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels.ops.quant_linear import formats, reference
from lora_kernels.ops.quant_linear.formats import QuantSpec

# Elements per chunk, a multiple of twice any block size of the flat layout.
_CHUNK = 2**22


def quantize(w: Tensor, spec: QuantSpec) -> tuple[Tensor, ...]:
    """The parts of `w`; the same bytes as :func:`reference.quantize` gives."""
    if w.numel() == 0:
        return _empty(w.device, spec)
    if w.numel() <= _CHUNK or spec.layout in (formats.FP8_TENSOR, formats.FP8_BLOCK):
        return reference.quantize(w, spec)
    if spec.layout == formats.FLAT:
        return _flat(w.reshape(-1), spec)
    rows = w.reshape(spec.rows, spec.columns)
    if spec.format != "int4":
        chunks = [reference.quantize(c, _part(spec, c)) for c in _row_chunks(rows)]
        return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))
    dtypes = {reference.int4_scales_dtype(c, _part(spec, c)) for c in _row_chunks(rows)}
    dtype = torch.float32 if torch.float32 in dtypes else torch.float16
    chunks = [reference.quantize(c, _part(spec, c), dtype) for c in _row_chunks(rows)]
    along_n = [torch.cat(parts, 1) for parts in list(zip(*chunks, strict=True))[:3]]
    return (*along_n, *chunks[0][3:])


def _empty(device: torch.device, spec: QuantSpec) -> tuple[Tensor, ...]:
    """Parts of a tensor without elements, with the right tables."""
    parts = {p.name: torch.zeros(p.shape, dtype=p.dtypes[0], device=device)
             for p in formats.parts_of(spec)}  # fmt: skip
    if spec.layout == formats.FLAT:
        parts["code"] = formats.code_table(spec.format).to(device, copy=True)
    if spec.nested_block_size:
        parts["nested_code"] = formats.dynamic_map().to(device, copy=True)
    if "g_idx" in parts:
        parts["g_idx"] = torch.arange(spec.columns, device=device).int() // spec.block_size
    return tuple(parts.values())


def _part(spec: QuantSpec, chunk: Tensor) -> QuantSpec:
    return replace(spec, shape=tuple(chunk.shape), nested_block_size=0)


def _row_chunks(rows: Tensor) -> Iterator[Tensor]:
    """Whole rows, a multiple of eight of them, which one int32 may pack."""
    step = max(1, _CHUNK // max(1, rows.shape[1]) // 8) * 8
    return iter(rows.split(step))


def _flat(flat: Tensor, spec: QuantSpec) -> tuple[Tensor, ...]:
    chunks = [reference.quantize(c, _part(spec, c)) for c in flat.split(_CHUNK)]
    packed, absmax = (torch.cat([c[i] for c in chunks]) for i in (0, 1))
    code = chunks[0][2]
    if not spec.nested_block_size:
        return packed, absmax, code
    codes, nested_absmax, nested_code, offset = reference.nest(absmax, spec.nested_block_size)
    return packed, codes, code, nested_absmax, nested_code, offset
