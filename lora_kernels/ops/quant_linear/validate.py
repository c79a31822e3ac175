"""Argument checks of quant_linear, in a fixed order: device, dtype, shape, values.

Every message is one line: the argument, what was given, what is accepted.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops.quant_linear import formats
from lora_kernels.ops.quant_linear.formats import FLOATS, QuantSpec
from lora_kernels.ops.quant_linear.problem import FORMAT_NAMES
from lora_kernels.ops.quant_linear.quant_tensor import QuantTensor

_DTYPE_NAMES = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
STORAGES = (torch.uint8, torch.int8, *FLOATS)
_DEFAULT_BLOCK = {formats.FLAT: 64, formats.GPTQ: 128, formats.AWQ: 128, formats.FP8_BLOCK: 128}


def _fail(op: str, message: str) -> NoReturn:
    raise InvalidArgumentError(f"{op}: {message}")


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


def make_spec(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    format: str,
    block_size: int | None,
    double_quant: bool | None,
    quant_storage: torch.dtype | None = None,
    what: str = "w",
) -> QuantSpec:
    """The spec that `quantize` fills for these arguments; every one checked."""
    if dtype not in FLOATS:
        _fail("quantize", f"{what} has dtype {dtype}; accepted: {_DTYPE_NAMES}")
    if format not in FORMAT_NAMES:
        _fail("quantize", f"format={format!r}; accepted: {', '.join(FORMAT_NAMES)}")
    kind, layout = FORMAT_NAMES[format]
    if not shape or (layout != formats.FLAT and len(shape) != 2):
        accepted = "one axis or more" if layout == formats.FLAT else "[out_features, in_features]"
        _fail("quantize", f"{what} has shape {list(shape)}; {format} accepts: {accepted}")
    block = _block_size(layout, format, block_size, shape[-1])
    if double_quant and layout != formats.FLAT:
        _fail("quantize", f"double_quant=True; {format} has no nested statistics, nf4 and fp4 have")
    nested = formats.NESTED_BLOCK if layout == formats.FLAT and double_quant is not False else 0
    storage = formats.default_storage(layout)
    if quant_storage is not None:
        if layout != formats.FLAT:
            _fail("quantize", f"quant_storage={quant_storage}; {format} has none, nf4 and fp4 have")
        if quant_storage not in STORAGES:
            names = ", ".join(str(d).removeprefix("torch.") for d in STORAGES)
            _fail("quantize", f"quant_storage={quant_storage}; accepted: {names}")
        storage = quant_storage
    return QuantSpec(kind, layout, tuple(shape), dtype, block, nested, False, storage)


def check_weight(w: Tensor, what: str) -> None:
    """Something to quantize: a tensor with finite values that the statistics can hold."""
    if not isinstance(w, Tensor):
        _fail("quantize", f"{what} is a {type(w).__name__}; accepted: torch.Tensor")
    if w.is_meta:
        _fail("quantize", f"{what} is on the meta device and has no values; load it first")
    if w.dtype not in FLOATS:
        _fail("quantize", f"{what} has dtype {w.dtype}; accepted: {_DTYPE_NAMES}")
    if w.numel() and not bool(torch.isfinite(w).all()):
        bad = int((~torch.isfinite(w)).sum())
        _fail("quantize", f"{what} has {bad} NaN or infinite values of {w.numel()}")
    largest = float(w.abs().max()) if w.numel() else 0.0
    if largest > formats.MAX_VALUE:
        limit = f"{formats.MAX_VALUE:.3g}, beyond which products of statistics overflow float32"
        _fail("quantize", f"{what} has values up to {largest:.3g}; accepted: up to {limit}")


def _block_size(layout: str, format: str, block_size: int | None, k: int) -> int:
    if layout not in _DEFAULT_BLOCK:
        if block_size is not None:
            _fail("quantize", f"block_size={block_size}; {format} has none, leave it out")
        return max(1, k)
    given = _DEFAULT_BLOCK[layout] if block_size is None else block_size
    if not isinstance(given, int) or isinstance(given, bool):
        _fail("quantize", f"block_size={given!r}; accepted: an integer")
    if layout == formats.FLAT:
        if given not in formats.BLOCK_SIZES:
            sizes = ", ".join(map(str, formats.BLOCK_SIZES))
            _fail("quantize", f"block_size={given}; {format} accepts: {sizes}")
        return given
    if given == -1 and layout != formats.FP8_BLOCK:
        return max(1, k)
    if given < 1:
        hint = "an integer >= 1" + ("" if layout == formats.FP8_BLOCK else ", or -1 for all of K")
        _fail("quantize", f"block_size={given}; {format} accepts: {hint}")
    return min(given, max(1, k)) if layout != formats.FP8_BLOCK else given


def check_quant_tensor(op: str, q: object) -> QuantTensor:
    if not isinstance(q, QuantTensor):
        hint = "quantize it first" if isinstance(q, Tensor) else "see lora_kernels.ops.quantize"
        _fail(op, f"q is a {type(q).__name__}; accepted: lora_kernels.QuantTensor ({hint})")
    return q


def check_dtype(op: str, dtype: object) -> None:
    if dtype not in FLOATS:
        _fail(op, f"dtype={dtype}; accepted: {_DTYPE_NAMES}")


def check_dropout(op: str, dropout_p: float) -> None:
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0:
        _fail(op, f"dropout_p={dropout_p!r} is not a probability; accepted: 0 to 1")


def check_scaling(op: str, scaling: float) -> None:
    if isinstance(scaling, Tensor):
        _fail(op, "scaling is a tensor; accepted: a finite number")
    if torch.compiler.is_compiling():
        return  # a traced float has no value yet
    try:
        finite = math.isfinite(scaling)
    except TypeError:
        finite = False
    if not finite:
        _fail(op, f"scaling={scaling!r} is not usable; accepted: a finite number")


def check_tensors(
    op: str, x: Tensor, q: QuantTensor, bias: Tensor | None,
    lora_a: Tensor | None, lora_b: Tensor | None,
) -> None:  # fmt: skip
    if not isinstance(x, Tensor):
        _fail(op, f"x is a {type(x).__name__}; accepted: torch.Tensor")
    named = [(n, t) for n, t in (("lora_a", lora_a), ("lora_b", lora_b), ("bias", bias))
             if t is not None]  # fmt: skip
    for name, t in named:
        if not isinstance(t, Tensor):
            _fail(op, f"{name} is a {type(t).__name__}; accepted: torch.Tensor")
    for name, device in [("q", q.device), *((n, t.device) for n, t in named)]:
        if device != x.device:
            _fail(op, f"{name} is on {device} but x is on {x.device}; move them to one device")
    for name, t in [("x", x), *named]:
        if t.dtype not in FLOATS:
            _fail(op, f"{name} has dtype {t.dtype}; accepted: {_DTYPE_NAMES}")
    if q.ndim != 2:
        _fail(op, f"q has shape {list(q.shape)}; accepted: [out_features, in_features]")
    n, k = q.shape
    if x.dim() == 0 or x.shape[-1] != k:
        _fail(op, f"x has shape {_shape(x)}; accepted: [..., {k}] for q {list(q.shape)}")
    if lora_a is not None and (lora_a.dim() != 2 or lora_a.shape[1] != k or lora_a.shape[0] < 1):
        _fail(op, f"lora_a has shape {_shape(lora_a)}; accepted: [r >= 1, {k}] for x {_shape(x)}")
    if lora_a is not None and lora_b is not None:
        r = lora_a.shape[0]
        if lora_b.dim() != 2 or lora_b.shape[0] != n or lora_b.shape[1] != r:
            _fail(op, f"lora_b has shape {_shape(lora_b)}; accepted: [{n}, {r}] for q "
                      f"{list(q.shape)} and lora_a {_shape(lora_a)}")  # fmt: skip
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != n):
        _fail(op, f"bias has shape {_shape(bias)}; accepted: [{n}]")


def make_seed(
    op: str, seed: int | Tensor | None, dropout_p: float, device: torch.device
) -> Tensor | None:
    """The dropout seed as an int64 tensor on `device`; drawn from torch's generator when None."""
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(0, 2**62, (), device=device, dtype=torch.int64)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            _fail(op, f"seed is a {seed.dtype} tensor of {seed.numel()} elements; "
                      "accepted: an int or an int64 tensor of one element")  # fmt: skip
        return seed.detach().reshape(()).to(device)
    if not isinstance(seed, int) or isinstance(seed, bool):
        _fail(op, f"seed={seed!r} is a {type(seed).__name__}; accepted: an int or an int64 tensor")
    if not 0 <= seed < 2**63:
        _fail(op, f"seed={seed} is out of range; accepted: 0 to 2**63 - 1")
    return torch.tensor(seed, device=device, dtype=torch.int64)


def check_present(op: str, argument: str, t: object) -> None:
    if t is None:
        _fail(op, f"{argument} is None; accepted: torch.Tensor (without an adapter: quant_linear)")
