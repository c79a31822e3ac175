"""A quantized weight: packed data, its statistics, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops.quant_linear.formats import FLOATS, FORMATS, QuantSpec, from_key, parts_of


class QuantTensor:
    """A quantized [out_features, in_features] weight; never trained, never re-quantized.

    Not a torch.Tensor: it holds plain tensors, so that copying, pickling, moving and saving are
    those of plain tensors and nothing has to intercept torch operators. Make one with
    :func:`lora_kernels.ops.quantize`, :func:`lora_kernels.load_quantized` or
    :meth:`from_state_dict`; as the weight of a module, see :class:`lora_kernels.QuantLinear`.

    Args:
        spec: format, layout and shape.
        parts: the tensors by name, or in the order of :func:`formats.parts_of`.

    Attributes:
        spec: the :class:`QuantSpec`.
        parts: the tensors, in order, on one device.

    Raises:
        InvalidArgumentError: a part is missing, or its dtype, shape or device is not what `spec`
            needs; the message names it.
    """

    __slots__ = ("parts", "spec")
    requires_grad = False

    def __init__(self, spec: QuantSpec, parts: Mapping[str, Tensor] | Sequence[Tensor]) -> None:
        self.spec = spec
        self.parts = check_parts(spec, parts)

    @classmethod
    def unchecked(cls, spec: QuantSpec, parts: tuple[Tensor, ...]) -> QuantTensor:
        """Without the checks, for parts that have passed them."""
        made = cls.__new__(cls)
        made.spec, made.parts = spec, parts
        return made

    @property
    def format(self) -> str:
        """nf4, fp4, int8, int4 or fp8."""
        return self.spec.format

    @property
    def layout(self) -> str:
        return self.spec.layout

    @property
    def block_size(self) -> int:
        return self.spec.block_size

    @property
    def double_quant(self) -> bool:
        return self.spec.nested_block_size > 0

    @property
    def shape(self) -> torch.Size:
        """Of the dequantized tensor."""
        return torch.Size(self.spec.shape)

    @property
    def ndim(self) -> int:
        return len(self.spec.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the dequantized tensor, unless another is asked for."""
        return self.spec.dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(t.numel() * t.element_size() for t in self.parts)

    def numel(self) -> int:
        return self.spec.numel

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def named_parts(self) -> dict[str, Tensor]:
        return {p.name: t for p, t in zip(parts_of(self.spec), self.parts, strict=True)}

    def to(self, *args: Any, **kwargs: Any) -> QuantTensor:
        """As Tensor.to. A device moves the parts; a dtype is that of later dequantization.

        The packed data and the statistics keep their bytes whatever the dtype.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        spec = self.spec
        if dtype is not None:
            if dtype not in FLOATS:
                raise InvalidArgumentError(
                    f"dtype={dtype}; accepted: "
                    + ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
                )
            spec = spec.with_dtype(dtype)
        if device is None:
            return QuantTensor.unchecked(spec, self.parts)
        moved = tuple(t.to(device, non_blocking=non_blocking) for t in self.parts)
        return QuantTensor.unchecked(spec, moved)

    def cpu(self) -> QuantTensor:
        return self.to("cpu")

    def cuda(self, device: int | torch.device | str | None = None) -> QuantTensor:
        return self.to("cuda" if device is None else torch.device("cuda", device)
                       if isinstance(device, int) else device)  # fmt: skip

    def clone(self) -> QuantTensor:
        return QuantTensor.unchecked(self.spec, tuple(t.clone() for t in self.parts))

    def detach(self) -> QuantTensor:
        return self

    def pin_memory(self) -> QuantTensor:
        return QuantTensor.unchecked(self.spec, tuple(t.pin_memory() for t in self.parts))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """:func:`lora_kernels.ops.dequantize` of this."""
        from lora_kernels.ops.quant_linear.api import dequantize

        return dequantize(self, dtype=dtype)

    def equal(self, other: object) -> bool:
        """Same spec, same bytes, in every part."""
        return (
            isinstance(other, QuantTensor)
            and self.spec == other.spec
            and all(
                a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))
                for a, b in zip(self.parts, other.parts, strict=True)
            )
        )

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Plain tensors under the keys of the format's own checkpoints (``weight.absmax``, ...).

        For int8, int4 and fp8 with a line ``quant_spec`` of text more, so that reading it back
        gives an equal QuantTensor.
        """
        from lora_kernels.ops.quant_linear.checkpoint import to_state_dict

        return to_state_dict(self, prefix, describe=True)

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Tensor], prefix: str = "", **hints: Any
    ) -> QuantTensor:
        """The weight stored under `prefix`; keywords as :func:`checkpoint.from_state_dict`."""
        from lora_kernels.ops.quant_linear.checkpoint import from_state_dict

        return from_state_dict(state_dict, prefix, **hints)

    def __reduce__(self) -> tuple[Any, ...]:
        # float8 as bytes: torch cannot pickle it outside of torch.save.
        parts = tuple(t.view(torch.uint8) if _is_float8(t) else t for t in self.parts)
        return _rebuild, (self.spec.key, parts)

    def __repr__(self) -> str:
        s = self.spec
        block = f", block_size={s.block_size}" if s.layout != "int8_row" else ""
        nested = ", double_quant=True" if s.nested_block_size else ""
        return (
            f"QuantTensor({s.format}, layout={s.layout}, shape={list(s.shape)}, dtype={s.dtype}"
            f"{block}{nested}, device={self.device})"
        )


def _is_float8(t: Tensor) -> bool:
    return t.dtype == torch.float8_e4m3fn


def _rebuild(key: str, parts: tuple[Tensor, ...]) -> QuantTensor:
    """Inverse of pickling; checked, as a pickle may come from anywhere."""
    spec = from_key(key)
    wanted = parts_of(spec)
    views = [t.view(torch.float8_e4m3fn) if torch.float8_e4m3fn in p.dtypes else t
             for p, t in zip(wanted, parts, strict=True)]  # fmt: skip
    return QuantTensor(spec, views)


torch.serialization.add_safe_globals([_rebuild])  # torch.load(weights_only=True)


def _bytes(t: Tensor) -> Tensor:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def check_parts(
    spec: QuantSpec, parts: Mapping[str, Tensor] | Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The parts in order, contiguous; raises InvalidArgumentError as :class:`QuantTensor`."""
    if spec.layout not in FORMATS.get(spec.format, ()):
        raise InvalidArgumentError(
            f"format={spec.format!r} with layout={spec.layout!r}; accepted: "
            + ", ".join(f"{f} ({', '.join(ls)})" for f, ls in FORMATS.items())
        )
    wanted = parts_of(spec)
    if not isinstance(parts, Mapping):
        if len(parts) != len(wanted):
            names = ", ".join(p.name for p in wanted)
            raise InvalidArgumentError(f"{len(parts)} parts; accepted: {len(wanted)} ({names})")
        parts = dict(zip((p.name for p in wanted), parts, strict=True))
    found = []
    for part in wanted:
        t = parts.get(part.name)
        if not isinstance(t, Tensor):
            what = "missing" if t is None else f"a {type(t).__name__}"
            raise InvalidArgumentError(
                f"part {part.name!r} of a {spec.format} ({spec.layout}) weight is {what}"
            )
        if t.dtype not in part.dtypes or tuple(t.shape) != part.shape:
            accepted = " or ".join(str(d).removeprefix("torch.") for d in part.dtypes)
            given = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
            raise InvalidArgumentError(
                f"part {part.name!r} is {given}; a {spec.format} ({spec.layout}) weight of shape "
                f"{list(spec.shape)} with block_size {spec.block_size} needs {accepted} "
                f"{list(part.shape)}"
            )
        found.append(t.detach())
    unknown = sorted(set(parts) - {p.name for p in wanted})
    if unknown:
        raise InvalidArgumentError(
            f"part {unknown[0]!r} does not belong to a {spec.format} ({spec.layout}) weight"
        )
    devices = {str(t.device) for t in found}
    if len(devices) > 1:
        raise InvalidArgumentError(
            f"the parts are on several devices: {', '.join(sorted(devices))}"
        )
    return tuple(t.contiguous() for t in found)
