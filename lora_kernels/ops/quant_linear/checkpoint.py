"""Quantized weights under the keys of the checkpoints that hold them, both ways.

With P the path of a layer and a dot:

    nf4, fp4   P weight, P weight.absmax, P weight.quant_map, P weight.nested_absmax,
               P weight.nested_quant_map, P weight.quant_state.bitsandbytes__nf4 (UTF-8 JSON)
    int8       P weight, P SCB, P weight_format
    int4       P qweight, P qzeros, P scales, P g_idx (GPTQ)
    fp8        P weight, P weight_scale (tensor, row) or P weight_scale_inv (block)

A reader trusts nothing: every size that a JSON blob claims is compared with the tensors that are
there before anything is computed from it. Tensors that already have the right dtype are not copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError, QuantizedWeightError
from lora_kernels.ops.quant_linear import checkpoint_bitsandbytes, checkpoint_int4, formats
from lora_kernels.ops.quant_linear.checkpoint_keys import Reader
from lora_kernels.ops.quant_linear.formats import FLOATS, QuantSpec
from lora_kernels.ops.quant_linear.quant_tensor import QuantTensor

DESCRIPTION = "quant_spec"
_MAX_DESCRIPTION = 512
_FP8_SCALES = ("weight_scale_inv", "weight_scale")
_FP8_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
# Ending that marks a quantized layer, kind, and the dtypes that the tensor at it must have.
_MARKS: tuple[tuple[str, str], ...] = (
    (f"{checkpoint_bitsandbytes.BLOB}nf4", "flat"),
    (f"{checkpoint_bitsandbytes.BLOB}fp4", "flat"),
    ("weight.absmax", "flat"),
    ("SCB", "int8"),
    ("qweight", "int4"),
    *((name, "fp8") for name in _FP8_SCALES),
)


@dataclass(frozen=True)
class Hints:
    """What the tensors of a checkpoint do not say, from its configuration.

    `dtype` of the dequantized weight; `bits`, `block_size` (-1: all of K) and `layout` (gptq,
    gptq_v1, awq) of int4; `block_size` of fp8_block.
    """

    dtype: torch.dtype | None = None
    layout: str | None = None
    bits: int | None = None
    block_size: int | None = None


def quantized_layers(names: Mapping[str, Any]) -> dict[str, str]:
    """Prefix (path and dot) -> kind, for every quantized layer among the keys of a state dict."""
    found: dict[str, str] = {}
    for name in names:
        for mark, kind in _MARKS:
            prefix = name[: len(name) - len(mark)]
            if name.endswith(mark) and prefix[-1:] in ("", "."):
                if kind == "fp8" and not _is_fp8(names.get(f"{prefix}weight")):
                    continue
                found.setdefault(prefix, kind)
    return found


def _is_fp8(weight: object) -> bool:
    return isinstance(weight, Tensor) and weight.dtype in (
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    )  # fmt: skip


def to_state_dict(q: QuantTensor, prefix: str = "", describe: bool = False) -> dict[str, Tensor]:
    """The parts of `q` under `prefix` (path and dot, or empty). They are not copied.

    `describe` adds what the keys of int8, int4 and fp8 do not tell (the dtype, the version) as one
    line of text under :data:`DESCRIPTION`, which other loaders may not expect.
    """
    parts, layout = q.named_parts(), q.layout
    if layout == formats.FLAT:
        found = checkpoint_bitsandbytes.flat_to_state_dict(q.spec, parts)
    elif layout == formats.INT8_ROW:
        found = checkpoint_bitsandbytes.int8_to_state_dict(parts)
    elif q.format == "int4":
        found = dict(parts)
    else:
        scale = parts["scale"]
        name = _FP8_SCALES[layout != formats.FP8_BLOCK]
        found = {
            "weight": parts["packed"],
            name: scale[:, None] if layout == formats.FP8_ROW else scale,
        }
    if describe and layout != formats.FLAT:
        text = q.spec.key.encode("utf-8")
        found[DESCRIPTION] = torch.tensor(list(text), dtype=torch.uint8)
    return {prefix + name: t for name, t in found.items()}


def from_state_dict(
    state_dict: Mapping[str, Tensor],
    prefix: str = "",
    *,
    dtype: torch.dtype | None = None,
    layout: str | None = None,
    block_size: int | None = None,
    bits: int | None = None,
) -> QuantTensor:
    """The quantized weight of the layer at `prefix` (path and dot, or empty).

    Args:
        dtype: of the dequantized weight where the tensors do not tell. None: float16 for int8, the
            dtype of the scales for int4, float32 for fp8.
        layout, block_size, bits: as :class:`Hints`; needed where an int4 weight is ambiguous.

    Raises:
        QuantizedWeightError: a key is missing or unknown, or does not fit the others; the message
            names it. Nothing that a key claims is allocated before.
    """
    kind = quantized_layers(state_dict).get(prefix)
    if kind is None:
        where = f"under {prefix!r}" if prefix else "here"
        raise QuantizedWeightError(
            f"there is no quantized weight {where}; accepted keys: weight and weight.quant_state."
            "bitsandbytes__nf4 or __fp4, weight and SCB, qweight, weight and weight_scale"
        )
    if dtype is not None and dtype not in FLOATS:
        raise InvalidArgumentError(f"dtype={dtype}; accepted: a floating dtype")
    return read_layer(Reader(state_dict, prefix), kind, Hints(dtype, layout, bits, block_size))


def read_layer(reader: Reader, kind: str, hints: Hints) -> QuantTensor:
    """The weight of one layer of known kind."""
    if kind != "flat" and reader.has(DESCRIPTION):
        hints = _described(reader, hints)
    if kind == "flat":
        spec, parts = checkpoint_bitsandbytes.read_flat(reader)
    elif kind == "int8":
        spec, parts = checkpoint_bitsandbytes.read_int8(reader, hints.dtype or torch.float16)
    elif kind == "int4":
        spec, parts = checkpoint_int4.read(
            reader, hints.dtype, hints.layout, hints.bits, hints.block_size
        )
    else:
        spec, parts = _read_fp8(reader, hints.dtype or torch.float32, hints.block_size)
    try:
        return QuantTensor(spec, parts)
    except InvalidArgumentError as error:
        raise QuantizedWeightError(f"{reader.prefix or 'the weight'}: {error}") from None


def _described(reader: Reader, hints: Hints) -> Hints:
    """What :data:`DESCRIPTION` says, where the caller did not."""
    raw = reader.tensor(DESCRIPTION, (torch.uint8,), 1)
    if raw.numel() > _MAX_DESCRIPTION:
        reader.fail(DESCRIPTION, f"has {raw.numel()} bytes; accepted: at most {_MAX_DESCRIPTION}")
    text = bytes(raw.tolist()).decode("utf-8", "replace")
    try:
        spec = formats.from_key(text)
    except (ValueError, AttributeError):
        spec = QuantSpec("", "", ())
    if spec.dtype not in FLOATS or spec.layout not in formats.FORMATS.get(spec.format, ()):
        reader.fail(DESCRIPTION, f"is {text[:80]!r}, which describes no quantized weight")
    return Hints(
        hints.dtype or spec.dtype, hints.layout or spec.layout, hints.bits,
        spec.block_size if hints.block_size is None else hints.block_size,
    )  # fmt: skip


def _read_fp8(
    reader: Reader, dtype: torch.dtype, block_size: int | None
) -> tuple[QuantSpec, dict[str, Tensor]]:
    weight = reader.tensor("weight", (torch.float8_e4m3fn,), 2)
    n, k = weight.shape
    name = next(s for s in _FP8_SCALES if reader.has(s))
    scale = reader.tensor(name, _FP8_SCALE_DTYPES).float()
    reader.check_finite(name, scale)
    spec = QuantSpec(
        "fp8", formats.FP8_TENSOR, (n, k), dtype, max(1, k), 0, False, torch.float8_e4m3fn
    )
    inverse = name == "weight_scale_inv"
    block = block_size if block_size is not None and block_size > 0 else 128
    tiles = (-(-n // block), -(-k // block))
    one = scale.numel() == 1 and (tuple(scale.shape) != tiles if inverse else n != 1)
    if scale.dim() == 0 or one:
        return spec, {"packed": weight, "scale": scale.reshape(())}
    if tuple(scale.shape) in ((n,), (n, 1)) and not inverse:
        return replace(spec, layout=formats.FP8_ROW), {"packed": weight, "scale": scale.reshape(n)}
    if tuple(scale.shape) != tiles:
        reader.fail(
            name,
            f"has shape {list(scale.shape)}; a weight of {[n, k]} accepts [], [{n}], [{n}, 1], or "
            f"{list(tiles)} for blocks of {block} x {block}",
        )
    spec = replace(spec, layout=formats.FP8_BLOCK, block_size=block)
    return spec, {"packed": weight, "scale": scale}
