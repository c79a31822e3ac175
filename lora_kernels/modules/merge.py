"""Fold adapters into the weights and take them out again."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules import dora
from lora_kernels.modules.adapted_layer import AdaptedLayer
from lora_kernels.modules.lora_linear import LoRALinear
from lora_kernels.modules.quant_lora_linear import QuantLoRALinear
from lora_kernels.modules.quant_merge import (
    DEQUANTIZED,
    MergeReport,
    Target,
    merge_quantized,
    try_quantized,
)
from lora_kernels.modules.traversal import memory, require_lora_layers, tensor_owners, unwrap

_ORIGINAL, _RATIO = "original", "magnitude_ratio"


@torch.no_grad()
def merge(
    model: nn.Module,
    *,
    onto: str | os.PathLike[str] = DEQUANTIZED,
    requantize: bool | str = False,
    exact: bool = False,
    safe: bool = True,
) -> MergeReport:
    """Fold every adapter into its layer's weight, which then costs nothing extra to run.

    W becomes W + scaling B A (with DoRA, rescaled to the magnitudes), computed in fp32, or in
    fp64 where W or the adapter is, and rounded once to the dtype of W. The adapter's parameters
    stay; a merged layer ignores them, in training too, until :func:`unmerge`.

    A :class:`QuantLoRALinear` is replaced instead, by torch.nn.Linear or QuantLinear, and cannot
    be unmerged: `onto` says which W the update is added to, `requantize` how the sum is kept.

    Args:
        onto: for quantized layers: ``"dequantized"``, the weight that the adapter was trained
            over, or the path of a full-precision checkpoint (safetensors file or folder).
        requantize: for quantized layers: False keeps the sum in the dtype of the base, True
            quantizes it as the layer was, a format name in that format. Small updates do not
            survive that; the report says how much did.
        exact: keep a CPU copy of each W, so that unmerge restores it bit for bit. The copy is not
            part of the state dict. Without it unmerge subtracts, which is exact to rounding only.
        safe: compute everything once before the first write and refuse a result with NaN or
            infinity. Costs a second computation.

    Returns:
        Names of the layers that were merged now, a list; layers that already were are left alone.
        Its `residuals` has a :class:`Residual` for each quantized layer.

    Raises:
        QuantizedWeightError: the checkpoint of `onto` cannot be read or lacks a layer.
        InvalidArgumentError: `exact` with quantized layers, `onto` or `requantize` without any,
            a PEFT model, no LoRALinear, a weight that another module shares or
            that is sharded or on the meta device, or with `safe` a result that is not finite. The
            model is unchanged.
    """
    every = {n: m for n, m in _checked_layers(model, "merge_adapter()").items() if not m.merged}
    quantized = {n: m for n, m in every.items() if isinstance(m, QuantLoRALinear)}
    layers = {n: m for n, m in every.items() if n not in quantized}
    if exact and quantized:
        raise InvalidArgumentError(
            "exact=True; merged quantized layers are replaced, copy the model"
        )
    if not quantized and (onto != DEQUANTIZED or requantize is not False):
        raise InvalidArgumentError("onto and requantize are for quantized layers; there is none")
    target = Target.of(onto, requantize)
    _check_weights(model, layers)
    if safe:
        try_quantized(quantized, target)
        for name, layer in layers.items():
            for weight in _results(layer, _merged_weight):
                _check_finite(name, weight, "merging")
    for layer in layers.values():
        if isinstance(layer, AdaptedLayer):
            layer.merge(exact)
            continue
        state = {_ORIGINAL: layer.weight.detach().to("cpu", copy=True)} if exact else {}
        if layer.dora and not exact:
            state[_RATIO] = dora.magnitude_ratio(layer)
        # copy_ moves the version counter of W, by which packed copies notice the change.
        layer.weight.copy_(_merged_weight(layer))
        layer._unmerge_state = state
        layer.merged = True
    return MergeReport(every, merge_quantized(unwrap(model), quantized, target))


@torch.no_grad()
def unmerge(model: nn.Module) -> list[str]:
    """Undo :func:`merge`: restore the kept copies, or subtract scaling B A where none was kept.

    The subtraction uses the adapter as it is now, so do not change it while it is merged.

    Returns:
        Names of the layers that were unmerged; layers that were not merged are left alone.

    Raises:
        InvalidArgumentError: a PEFT model, no LoRALinear, or a weight that cannot be recovered
            (DoRA with a magnitude of zero: merge with exact=True); the model is unchanged.
    """
    layers = {n: m for n, m in _checked_layers(model, "unmerge_adapter()").items() if m.merged}
    for name, layer in layers.items():
        if _ORIGINAL not in layer._unmerge_state:
            for weight in _results(layer, _unmerged_weight):
                _check_finite(name, weight, "unmerging")
    for layer in layers.values():
        if isinstance(layer, AdaptedLayer):
            layer.unmerge()
            continue
        layer.weight.copy_(_unmerged_weight(layer))
        layer._unmerge_state = {}
        layer.merged = False
    return list(layers)


def _results(
    layer: LoRALinear | AdaptedLayer, of_linear: Callable[[LoRALinear], Tensor]
) -> list[Tensor]:
    """The weights that merging, or its undoing, would give this layer."""
    if isinstance(layer, LoRALinear):
        return [of_linear(layer)]
    sign = 1.0 if of_linear is _merged_weight else -1.0
    return list(layer.merged_weights(sign).values())


def _checked_layers(model: nn.Module, peft_method: str) -> dict[str, LoRALinear | AdaptedLayer]:
    return require_lora_layers(model, f"its own {peft_method}")


def _check_weights(model: nn.Module, layers: dict[str, LoRALinear | AdaptedLayer]) -> None:
    owners = tensor_owners(unwrap(model))
    weights = [
        (name, layer, weight) for name, layer in layers.items() for weight in _weights_of(layer)
    ]
    for name, layer, weight in weights:
        if weight.is_meta or type(weight.data) is not Tensor:
            kind = "on the meta device" if weight.is_meta else "sharded"
            raise InvalidArgumentError(f"layer {name!r} cannot be merged: its weight is {kind}")
        other = next(
            (o.name for o in owners.get(memory(weight), []) if o.module is not layer), None
        )
        if other is not None:
            raise InvalidArgumentError(
                f"layer {name!r} cannot be merged: its weight is tied to {other!r}, which would "
                "change, too; untie them first"
            )


def _weights_of(layer: LoRALinear | AdaptedLayer) -> list[Tensor]:
    if isinstance(layer, LoRALinear):
        return [layer.weight]
    return [getattr(layer, name) for name in layer.updates()]


def _merged_weight(layer: LoRALinear) -> Tensor:
    weight = dora.adapted_weight(layer, layer.weight)
    if layer.dora:
        weight *= dora.magnitude_ratio(layer)[:, None]
    return weight.to(layer.weight.dtype)


def _unmerged_weight(layer: LoRALinear) -> Tensor:
    state = layer._unmerge_state
    if _ORIGINAL in state:
        return state[_ORIGINAL]
    weight = layer.weight
    if _RATIO in state:
        weight = weight / state[_RATIO].to(weight.device)[:, None]
    return dora.adapted_weight(layer, weight, sign=-1.0).to(layer.weight.dtype)


def _check_finite(name: str, weight: Tensor, doing: str) -> None:
    if not torch.isfinite(weight).all():
        raise InvalidArgumentError(
            f"{doing} layer {name!r} would give a weight with NaN or infinity; nothing was changed"
        )
