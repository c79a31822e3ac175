"""nn.Linear on a quantized, frozen weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError, QuantizedWeightError
from lora_kernels.modules.quant_peft import route_merging
from lora_kernels.ops.quant_linear import (
    Hints,
    QuantSpec,
    QuantTensor,
    Reader,
    make_spec,
    pack_storage,
    parts_of,
    quant_linear,
    quantize,
    quantized_layers,
    read_layer,
    to_state_dict,
    unpack_storage,
)

_Layer = TypeVar("_Layer", bound="QuantLinear")


class QuantLinear(nn.Linear):
    """``y = x W^T + bias`` with W quantized and frozen.

    The packed data is the parameter `weight` (never trained), the statistics are buffers, all of
    them plain tensors; that is what DDP broadcasts, FSDP2 shards and torch.compile traces without
    any special case. `quant_storage` gives the packed bytes a floating dtype for wrappers that
    want one dtype per group. ``module.to(dtype)``, ``half()`` and the like change bias (and
    adapter) and never packed data or statistics.

    State dict: the keys of the format's own checkpoints (bitsandbytes' for nf4, fp4, int8), so a
    saved model is a checkpoint that bitsandbytes loads, and theirs load here. A state dict with a
    plain ``weight`` of full precision is quantized as it is loaded.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear; dtype is that of the
            bias and of the dequantized weight.
        format, block_size, double_quant, quant_storage: as in :func:`lora_kernels.ops.quantize`.
        compute_dtype: convert the input to this dtype for the computation, and the result back.
            None: compute in the dtype of the input.

    Shapes: x ``[..., in_features]`` to y ``[..., out_features]``, in the dtype of x or, under
    autocast, in the autocast dtype.

    Raises:
        InvalidArgumentError: a format or an argument of it that is not supported.
    """

    spec: QuantSpec

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: str = "nf4",
        block_size: int | None = None,
        double_quant: bool | None = None,
        quant_storage: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a dense weight
        dtype = dtype or torch.get_default_dtype()
        shape = (out_features, in_features)
        spec = make_spec(shape, dtype, format, block_size, double_quant, quant_storage)
        self.compute_dtype = compute_dtype
        if torch.device(device or torch.get_default_device()).type == "meta":
            parts = tuple(
                torch.empty(p.shape, dtype=p.dtypes[0], device="meta") for p in parts_of(spec)
            )
            q = QuantTensor.unchecked(spec, parts)
        else:
            zeros = torch.zeros(shape, dtype=dtype, device=device)
            q = quantize(zeros, format, block_size, double_quant, quant_storage=quant_storage)
        self._adopt(q)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: str = "nf4",
        block_size: int | None = None,
        double_quant: bool | None = None,
        quant_storage: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        name: str | None = None,
    ) -> QuantLinear:
        """Quantize the weight of `linear`; its bias is shared, its weight is not kept.

        Raises:
            InvalidArgumentError: NaN or infinity in the weight (called `name`), or an argument that
                :func:`lora_kernels.ops.quantize` does not take.
        """
        q = quantize(
            linear.weight.detach(), format, block_size, double_quant,
            quant_storage=quant_storage, name=name,
        )  # fmt: skip
        return cls.from_quantized(q, linear.bias, compute_dtype).train(linear.training)

    @classmethod
    def from_quantized(
        cls,
        q: QuantTensor,
        bias: nn.Parameter | Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> QuantLinear:
        """A layer on `q` [out_features, in_features], which is shared, and `bias`."""
        if q.ndim != 2:
            raise InvalidArgumentError(
                f"q has shape {list(q.shape)}; accepted: [out_features, in_features]"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.compute_dtype = compute_dtype
        layer._adopt(q)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        layer.register_parameter("bias", bias)
        return layer

    def _adopt(self, q: QuantTensor) -> None:
        """Hold the parts of `q`."""
        route_merging()
        self.spec = q.spec
        self.out_features, self.in_features = q.shape
        names = tuple(p.name for p in parts_of(q.spec))
        self._statistics = names[1:]
        for stale in [n for n in self._buffers if n not in names]:
            del self._buffers[stale]
        first = q.parts[0]
        if q.layout == "flat":
            first = pack_storage(first, q.spec.storage)
        weight = self._parameters.get("weight")
        if weight is None or weight.is_meta or weight.shape != first.shape:
            self.weight = nn.Parameter(first, requires_grad=False)
        else:
            weight.data = first.to(weight.device)
        for name, part in zip(names[1:], q.parts[1:], strict=True):
            self.register_buffer(name, part)

    @property
    def quant_weight(self) -> QuantTensor:
        """The weight, sharing memory with this module."""
        spec, first = self.spec, self.weight.detach()
        if first.dtype != spec.storage:
            raise InvalidArgumentError(
                f"the packed data were converted to {str(first.dtype).removeprefix('torch.')} from "
                f"{str(spec.storage).removeprefix('torch.')} and are lost; load the weight again"
            )
        if spec.layout == "flat":
            first = unpack_storage(first, -(-spec.numel // 2))
        statistics = tuple(getattr(self, name) for name in self._statistics)
        return QuantTensor.unchecked(spec, (first, *statistics))

    @property
    def format(self) -> str:
        return self.spec.format

    def train(self: _Layer, mode: bool = True) -> _Layer:
        """As nn.Module.train."""
        route_merging()  # PEFT may have been imported since
        super().train(mode)
        return self

    def forward(self, input: Tensor) -> Tensor:
        if self.compute_dtype is None:
            return quant_linear(input, self.quant_weight, self.bias)
        y = quant_linear(input.to(self.compute_dtype), self.quant_weight, self.bias)
        return y.to(input.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A torch.nn.Linear with the dequantized weight, which shares the bias."""
        weight = self.quant_weight.dequantize(dtype)
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    def reset_parameters(self) -> None:
        """Nothing: the weight comes from a checkpoint or another layer."""

    def extra_repr(self) -> str:
        s = self.spec
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}",
            f"bias={self.bias is not None}, format={s.format}",
        ]
        if s.format in ("int4", "fp8"):
            parts.append(f"layout={s.layout}")
        if s.layout in ("flat", "gptq", "gptq_v1", "awq", "fp8_block"):
            parts.append(f"block_size={s.block_size}")
        if s.nested_block_size:
            parts.append("double_quant=True")
        return ", ".join(parts)

    # Copying and moving: bytes stay bytes.

    @contextmanager
    def _without_parts(self) -> Iterator[dict[str, Tensor]]:
        """Take packed data and statistics out of the module for a while."""
        names = self._statistics
        kept: dict[str, Tensor] = {"weight": self._parameters.pop("weight")}  # type: ignore[dict-item]
        kept |= {n: self._buffers.pop(n) for n in names}  # type: ignore[misc]
        bias = self._parameters.pop("bias")
        try:
            self._parameters["bias"] = bias
            yield kept
        finally:
            others = dict(self._parameters)
            self._parameters.clear()
            self._parameters["weight"] = kept.pop("weight")  # type: ignore[assignment]
            self._parameters.update(others)
            self._buffers.update(kept)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Devices change for all, dtypes for bias and adapter only: parts are seen as bytes."""
        with self._without_parts() as parts:
            super()._apply(fn, recurse)
            for name, part in parts.items():
                moved = _apply_to_bytes(fn, part.data if name == "weight" else part)
                if name != "weight":
                    parts[name] = moved
                elif torch._has_compatible_shallow_copy_type(part.data, moved):
                    part.data = moved
                else:
                    parts[name] = nn.Parameter(moved, requires_grad=False)
        return self

    # State dicts in the keys of the format's checkpoints.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with self._without_parts() as parts:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            stored = parts["weight"]
        # The packed data may be a shard of FSDP2, which nothing here has to look into.
        head = parts_of(self.spec)[0]
        nothing = torch.empty(head.shape, dtype=head.dtypes[0], device="meta")
        statistics = tuple(getattr(self, name) for name in self._statistics)
        found = to_state_dict(QuantTensor.unchecked(self.spec, (nothing, *statistics)), prefix)
        first = next(iter(found))  # weight or qweight; stored as it is, sharded if it is
        found[first] = stored if keep_vars else stored.detach()
        for name, t in found.items():
            destination[name] = t

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
        used: set[str] = set()
        try:
            q, used = self._read(own, prefix)
            if q is None:
                missing_keys.append(f"{prefix}{self._first_key()}")
            else:
                with torch.no_grad():
                    device = self.weight.device
                    self._adopt(q if device.type == "meta" else q.to(device))
        except (QuantizedWeightError, InvalidArgumentError) as error:
            error_msgs.append(str(error))
            used = set(own) - {f"{prefix}{n}" for n in self._parameters if n != "weight"}
        rest = {k: v for k, v in own.items() if k not in used}
        with self._without_parts():
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def _first_key(self) -> str:
        return "qweight" if self.spec.format == "int4" else "weight"

    def _read(
        self, state_dict: Mapping[str, Any], prefix: str
    ) -> tuple[QuantTensor | None, set[str]]:
        """(the weight in `state_dict` that fits this layer, the keys that it was made of)."""
        s, shape = self.spec, (self.out_features, self.in_features)
        kind = quantized_layers(state_dict).get(prefix)
        dense = state_dict.get(f"{prefix}weight")
        if kind is None:
            if dense is None or not dense.is_floating_point():
                return None, set()
            if tuple(dense.shape) != shape:
                raise QuantizedWeightError(
                    f"{prefix}weight has shape {list(dense.shape)}; this layer has {list(shape)}"
                )
            return quantize_like(dense, s, f"{prefix}weight"), {f"{prefix}weight"}
        reader = Reader(state_dict, prefix)
        int4 = s.format == "int4"
        block = s.block_size if int4 or s.layout == "fp8_block" else None
        hints = Hints(s.dtype, s.layout if int4 else None, None, block)
        q = read_layer(reader, kind, hints)
        if q.format != s.format or (int4 and q.layout != s.layout):
            raise QuantizedWeightError(
                f"{prefix}weight is {q.format} ({q.layout}); this layer is {s.format} ({s.layout})"
            )
        if tuple(q.shape) != shape:
            raise QuantizedWeightError(
                f"{prefix}weight has shape {list(q.shape)}; this layer has {list(shape)}"
            )
        return q, reader.used


def quantize_like(dense: Tensor, spec: QuantSpec, name: str) -> QuantTensor:
    """`dense` in the format, block size and storage of `spec`."""
    formats = {("int4", "awq"): "int4_awq", ("int4", "gptq_v1"): "int4"}
    own = spec.layout if spec.format == "fp8" else spec.format
    flat = spec.layout == "flat"
    sized = flat or spec.format == "int4" or spec.layout == "fp8_block"
    return quantize(
        dense,
        formats.get((spec.format, spec.layout), own),
        spec.block_size if sized else None,
        spec.nested_block_size > 0 if flat else None,
        quant_storage=spec.storage if flat else None,
        name=name,
    )


def _apply_to_bytes(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """`fn` on the bytes of `t`; a conversion of dtype then has nothing to convert."""
    if type(t) not in (Tensor, nn.Parameter):  # a shard of FSDP2
        moved = fn(t)
        return moved if moved.dtype == t.dtype else t
    flat = t.detach().reshape(-1).view(torch.uint8)
    moved = fn(flat)
    if moved.dtype != torch.uint8:  # Module.type() converts integers, too
        moved = flat.to(moved.device)
    return moved.view(t.dtype).view(t.shape)
