"""Fold adapters over quantized weights: onto which base, stored as what, and what that costs.

The adapter was trained against the dequantized weight W4. Merged onto W4 and kept in 16 or 32 bits
the layer computes what it computed before. Merged onto the original weight it differs by the error
of quantization, which the adapter may have learned to undo. Quantized again, most of a small
adapter can vanish in the rounding: an update below half a step of the grid leaves the code as it
was. The residuals say how much of that happened.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError, QuantizedWeightError
from lora_kernels.modules.quant_checkpoint import load_quantized
from lora_kernels.modules.quant_linear import QuantLinear, quantize_like
from lora_kernels.modules.quant_lora_linear import QuantLoRALinear
from lora_kernels.ops.quant_linear import FORMAT_NAMES, QuantTensor, quantize

DEQUANTIZED = "dequantized"


@dataclass(frozen=True)
class Residual:
    """One merged layer; norms are Frobenius norms.

    With base W, update D = scaling B A and V the values that are stored now:

    Attributes:
        update_norm: of D.
        norm, max: of V - (W + D), the rounding of what is stored.
        survival: <V - W, D> / <D, D>: the share of the update that is in V; 1 is all of it, about
            0 an adapter that was rounded away. 1 where D is zero.
        stored: dtype or format of V.
    """

    update_norm: float
    norm: float
    max: float
    survival: float
    stored: str


class MergeReport(list[str]):
    """Names of the layers that were merged; `residuals` tells what became of quantized ones."""

    def __init__(
        self, names: Iterable[str], residuals: Mapping[str, Residual] | None = None
    ) -> None:
        super().__init__(names)
        self.residuals = dict(residuals or {})

    def to_dict(self) -> dict[str, Any]:
        return {
            "merged": list(self),
            "residuals": {name: asdict(r) for name, r in self.residuals.items()},
        }

    def __str__(self) -> str:
        if not self.residuals:
            return f"{len(self)} layers merged"
        rows = [("layer", "stored", "|update|", "|residual|", "max", "survival")]
        for name, r in self.residuals.items():
            norms = (f"{r.update_norm:.4g}", f"{r.norm:.4g}", f"{r.max:.4g}", f"{r.survival:.3f}")
            rows.append((name, r.stored, *norms))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([*lines, f"{len(self)} layers merged"])


@dataclass(frozen=True)
class Target:
    """Where the merged weights go: `onto` and `requantize` of :func:`lora_kernels.merge`."""

    originals: Mapping[str, Any] | None
    requantize: bool | str

    @classmethod
    def of(cls, onto: str | os.PathLike[str], requantize: bool | str) -> Target:
        """Reads the checkpoint that `onto` names.

        Raises:
            InvalidArgumentError: `requantize` is neither a bool nor a format.
            QuantizedWeightError: the checkpoint cannot be read.
        """
        if not isinstance(requantize, bool) and requantize not in FORMAT_NAMES:
            raise InvalidArgumentError(
                f"requantize={requantize!r}; accepted: False, True, {', '.join(FORMAT_NAMES)}"
            )
        if not isinstance(onto, (str, os.PathLike)):
            raise InvalidArgumentError(
                f"onto={onto!r}; accepted: {DEQUANTIZED!r} or the path of a checkpoint"
            )
        if onto == DEQUANTIZED:
            return cls(None, requantize)
        return cls(load_quantized(onto), requantize)

    def base(self, name: str, layer: QuantLinear) -> Tensor:
        """W of a layer, in the dtype that it is kept in when it is not quantized again."""
        if self.originals is None:
            return layer.quant_weight.dequantize()
        key = f"{name}.weight"
        # The checkpoint may name its layers from a wrapper above this model, or from below it.
        found = [
            k for k in self.originals if k == key or k.endswith(f".{key}") or key.endswith(f".{k}")
        ]
        exact = [k for k in found if k == key]
        chosen = exact or found
        if len(chosen) != 1:
            what = f"has {', '.join(chosen)}" if chosen else "lacks it"
            raise QuantizedWeightError(f"{key}: the checkpoint to merge onto {what}")
        weight = self.originals[chosen[0]]
        if isinstance(weight, QuantTensor) or not weight.is_floating_point():
            raise QuantizedWeightError(f"{chosen[0]} is quantized; merge onto full precision")
        if tuple(weight.shape) != (layer.out_features, layer.in_features):
            raise QuantizedWeightError(
                f"{chosen[0]} has shape {list(weight.shape)}; the layer has "
                f"{[layer.out_features, layer.in_features]}"
            )
        return weight.to(layer.weight.device)

    def stored(self, name: str, layer: QuantLinear, merged: Tensor) -> Tensor | QuantTensor:
        """`merged` [N, K], fp32 or fp64, as it will be kept."""
        if self.requantize is False:
            return merged
        if self.requantize is True:
            return quantize_like(merged, layer.spec, f"{name}.weight")
        return quantize(merged, str(self.requantize), name=f"{name}.weight")


@torch.no_grad()
def merged_layer(name: str, layer: QuantLoRALinear, target: Target) -> tuple[nn.Linear, Residual]:
    """The layer with the adapter folded in, and what was lost on the way.

    Raises:
        InvalidArgumentError: the result has NaN or infinity.
    """
    if layer.weight.is_meta or type(layer.weight.data) is not Tensor:
        kind = "on the meta device" if layer.weight.is_meta else "sharded"
        raise InvalidArgumentError(f"layer {name!r} cannot be merged: its weight is {kind}")
    base = target.base(name, layer)
    update = _update(layer)
    merged = base.to(update.dtype) + update
    if not bool(torch.isfinite(merged).all()):
        raise InvalidArgumentError(
            f"merging layer {name!r} would give a weight with NaN or infinity; nothing was changed"
        )
    kept = target.stored(name, layer, merged)
    made: nn.Linear
    if isinstance(kept, QuantTensor):
        kept = kept.to(layer.spec.dtype)
        values, stored = kept.dequantize(torch.float32), kept.format
        made = QuantLinear.from_quantized(kept, layer.bias, layer.compute_dtype)
    else:
        kept = kept.to(base.dtype)
        values, stored = kept, str(kept.dtype).removeprefix("torch.")
        made = nn.Linear(layer.in_features, layer.out_features, device="meta")
        made.weight = nn.Parameter(kept, requires_grad=False)
        made.register_parameter("bias", layer.bias)
    values = values.to(update.dtype)
    size = update.square().sum().item()
    through = ((values - base.to(update.dtype)) * update).sum().item()
    lost = values - merged
    residual = Residual(
        update_norm=size**0.5,
        norm=lost.norm().item(),
        max=lost.abs().max().item() if lost.numel() else 0.0,
        survival=through / size if size else 1.0,
        stored=stored,
    )
    return made.train(layer.training), residual


def _update(layer: QuantLoRALinear) -> Tensor:
    """scaling B A in fp32, or in fp64 where the adapter is."""
    dtype = torch.promote_types(layer.lora_A.dtype, torch.float32)
    a, b = layer.lora_A.to(dtype), layer.lora_B.to(dtype)
    with nullcontext() if a.is_meta else torch.autocast(a.device.type, enabled=False):
        return layer.scaling * (b @ a)


def try_quantized(layers: Mapping[str, QuantLoRALinear], target: Target) -> None:
    """Compute every merged layer once and keep none; raises what :func:`merged_layer` raises."""
    for name, layer in layers.items():
        merged_layer(name, layer, target)


def merge_quantized(
    model: nn.Module, layers: Mapping[str, QuantLoRALinear], target: Target
) -> dict[str, Residual]:
    """Put merged layers in the place of `layers`."""
    residuals = {}
    parents = list(model.modules())
    for name, layer in layers.items():
        made, residuals[name] = merged_layer(name, layer, target)
        for parent in parents:
            for child_name, child in list(parent._modules.items()):
                if child is layer:
                    setattr(parent, child_name, made)
    return residuals
