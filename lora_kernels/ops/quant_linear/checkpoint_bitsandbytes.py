"""bitsandbytes' checkpoints: 4-bit (Params4bit, QuantState) and 8-bit (Linear8bitLt)."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.quant_linear import formats
from lora_kernels.ops.quant_linear.checkpoint_keys import Reader, dtype_name
from lora_kernels.ops.quant_linear.formats import FLOATS, QuantSpec

BLOB = "weight.quant_state.bitsandbytes__"
_STATISTICS = (torch.float32, torch.bfloat16, torch.float16)
_STORAGES = (torch.uint8, torch.int8, *FLOATS)
_MAX_BLOB = 65536
_NESTED = ("nested_blocksize", "nested_dtype", "nested_offset")


def flat_to_state_dict(spec: QuantSpec, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """nf4, fp4: what Linear4bit's state_dict gives, byte for byte."""
    blob: dict[str, Any] = {
        "quant_type": spec.format,
        "blocksize": spec.block_size,
        "dtype": dtype_name(spec.dtype),
        "shape": list(spec.shape),
    }
    found = {
        "weight": pack_storage(parts["packed"], spec.storage),
        "weight.absmax": parts["absmax"],
        "weight.quant_map": parts["code"],
    }
    if spec.nested_block_size:
        found["weight.nested_absmax"] = parts["nested_absmax"]
        found["weight.nested_quant_map"] = parts["nested_code"]
        blob |= {
            "nested_blocksize": spec.nested_block_size,
            "nested_dtype": "float32",
            "nested_offset": 0.0 if parts["offset"].is_meta else parts["offset"].item(),
        }
    text = json.dumps(blob).encode("utf-8")
    found[BLOB + spec.format] = torch.tensor(list(text), dtype=torch.uint8)
    return found


def pack_storage(packed: Tensor, storage: torch.dtype) -> Tensor:
    """The bytes as [-1, 1] of dtype `storage`, the last element filled up with zero bytes."""
    missing = -packed.numel() % storage.itemsize
    if missing:
        packed = torch.cat([packed, packed.new_zeros(missing)])
    return packed.view(storage).view(-1, 1)


def unpack_storage(stored: Tensor, count: int) -> Tensor:
    """`count` bytes of what :func:`pack_storage` made, as uint8 [count]; a view."""
    return stored.reshape(-1).view(torch.uint8)[:count]


def int8_to_state_dict(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "weight": parts["packed"],
        "SCB": parts["scale"],
        "weight_format": torch.tensor(0, dtype=torch.uint8),  # row-major
    }


def _read_blob(reader: Reader) -> dict[str, Any]:
    names = [BLOB + kind for kind in ("nf4", "fp4") if reader.has(BLOB + kind)]
    if len(names) != 1:
        for key in reader.state_dict:
            if key.startswith(reader.prefix + BLOB) and not names:
                kind = key.removeprefix(reader.prefix + BLOB)
                reader.fail("weight", f"has the quant_type {kind!r}; accepted: nf4, fp4")
        reader.fail(
            BLOB + "nf4", "is missing" if not names else "and the one of fp4 are both there"
        )
    name = names[0]
    raw = reader.tensor(name, (torch.uint8,), 1)
    if raw.numel() > _MAX_BLOB:
        reader.fail(name, f"has {raw.numel()} bytes; accepted: at most {_MAX_BLOB}")
    try:
        blob = json.loads(bytes(raw.cpu().tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reader.fail(name, f"is not JSON: {str(error).splitlines()[0]}")
    if not isinstance(blob, dict):
        reader.fail(name, f"is a JSON {type(blob).__name__}; accepted: an object")
    for key in ("quant_type", "blocksize", "dtype", "shape"):
        if key not in blob:
            reader.fail(name, f"has no {key!r}")
    if blob["quant_type"] != name.removeprefix(BLOB):
        reader.fail(name, f"has quant_type {blob['quant_type']!r}, which is not that of the key")
    if type(blob["blocksize"]) is not int or blob["blocksize"] not in formats.BLOCK_SIZES:
        sizes = ", ".join(map(str, formats.BLOCK_SIZES))
        reader.fail(name, f"has blocksize {blob['blocksize']!r}; accepted: {sizes}")
    if blob["dtype"] not in [dtype_name(d) for d in FLOATS]:
        reader.fail(name, f"has dtype {blob['dtype']!r}; accepted: a floating dtype")
    shape = blob["shape"]
    natural = isinstance(shape, list) and shape and all(type(n) is int and n >= 0 for n in shape)
    if not natural or len(shape) > 8 or math.prod(shape) >= 2**62:
        reader.fail(name, f"has shape {str(shape)[:80]}; accepted: a list of integers >= 0")
    nested = [key for key in _NESTED if key in blob]
    if nested and len(nested) != len(_NESTED):
        absent = next(key for key in _NESTED if key not in blob)
        reader.fail(name, f"has {nested[0]!r} but no {absent!r}")
    if nested:
        _check_nested(reader, name, blob)
    return blob


def _check_nested(reader: Reader, name: str, blob: dict[str, Any]) -> None:
    if blob["nested_blocksize"] != formats.NESTED_BLOCK:
        reader.fail(
            name,
            f"has nested_blocksize {blob['nested_blocksize']!r}; accepted: {formats.NESTED_BLOCK}",
        )
    if blob["nested_dtype"] != "float32":
        reader.fail(name, f"has nested_dtype {blob['nested_dtype']!r}; accepted: float32")
    offset = blob["nested_offset"]
    if type(offset) not in (int, float) or not math.isfinite(offset) or abs(offset) > 3.4e38:
        reader.fail(name, f"has nested_offset {offset!r}; accepted: a finite number")


def read_flat(reader: Reader) -> tuple[QuantSpec, dict[str, Tensor]]:
    """A 4-bit weight. The JSON decides what the tensors have to be; they decide nothing."""
    blob = _read_blob(reader)
    stored = reader.tensor("weight", _STORAGES)
    spec = QuantSpec(
        blob["quant_type"], formats.FLAT, tuple(blob["shape"]), getattr(torch, blob["dtype"]),
        blob["blocksize"], blob.get("nested_blocksize", 0), False, stored.dtype,
    )  # fmt: skip
    needed, given = -(-spec.numel // 2), stored.numel() * stored.element_size()
    if not needed <= given < needed + max(1, stored.element_size()):
        reader.fail(
            "weight",
            f"has {given} bytes of packed data; the shape {blob['shape']} of its quant_state needs "
            f"{needed}",
        )
    absmax = reader.tensor("weight.absmax", (torch.uint8, *_STATISTICS))
    why = f"the shape {blob['shape']} in blocks of {spec.block_size}"
    reader.check_shape("weight.absmax", absmax, (spec.blocks,), why)
    code = reader.tensor("weight.quant_map", _STATISTICS)
    reader.check_shape("weight.quant_map", code, (16,), "a 4-bit weight")
    reader.check_finite("weight.quant_map", code)
    parts = {
        "packed": unpack_storage(stored.contiguous(), needed),
        "absmax": absmax,
        "code": code.float(),
    }
    nested = bool(spec.nested_block_size)
    if nested != (absmax.dtype == torch.uint8):
        reader.fail(
            "weight.absmax",
            f"is {dtype_name(absmax.dtype)} but its quant_state has "
            + ("nested statistics; accepted: uint8" if nested else "none; accepted: float32"),
        )
    if not nested:
        for name in ("weight.nested_absmax", "weight.nested_quant_map"):
            if reader.has(name):
                reader.fail(name, "is there but its quant_state has no nested statistics")
        reader.check_finite("weight.absmax", absmax)
        parts["absmax"] = absmax.float()
        return spec, parts
    nested_absmax = reader.tensor("weight.nested_absmax", _STATISTICS)
    count = -(-spec.blocks // spec.nested_block_size)
    reader.check_shape("weight.nested_absmax", nested_absmax, (count,), why)
    reader.check_finite("weight.nested_absmax", nested_absmax)
    nested_code = reader.tensor("weight.nested_quant_map", _STATISTICS)
    reader.check_shape("weight.nested_quant_map", nested_code, (256,), "nested statistics")
    reader.check_finite("weight.nested_quant_map", nested_code)
    offset = torch.tensor(blob["nested_offset"], dtype=torch.float32, device=stored.device)
    parts |= {
        "nested_absmax": nested_absmax.float(),
        "nested_code": nested_code.float(),
        "offset": offset,
    }
    return spec, parts


def read_int8(reader: Reader, dtype: torch.dtype) -> tuple[QuantSpec, dict[str, Tensor]]:
    """A Linear8bitLt weight; only the row-major layout, the one that is still written."""
    weight = reader.tensor("weight", (torch.int8,), 2)
    n, k = weight.shape
    scale = reader.tensor("SCB", _STATISTICS)
    if scale.numel() != n or max(scale.shape, default=1) != n:
        reader.fail("SCB", f"has shape {list(scale.shape)}; a weight of {[n, k]} needs [{n}]")
    reader.check_finite("SCB", scale)
    if reader.has("weight_format"):
        stored = reader.tensor("weight_format", (torch.uint8,))
        if stored.numel() != 1 or (not stored.is_meta and int(stored.reshape(()).item()) != 0):
            reader.fail("weight_format", f"is {stored.tolist()}; accepted: 0 (row-major)")
    spec = QuantSpec("int8", formats.INT8_ROW, (n, k), dtype, max(1, k), 0, False, torch.int8)
    return spec, {"packed": weight, "scale": scale.reshape(n).float()}
