"""Linear layers of one input, adapted or not, dense or quantized, with as few calls as can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules import grouped_linear
from lora_kernels.modules.input_norm import Given, adapted
from lora_kernels.modules.layer_group import (
    AnyOperands,
    Operands,
    agree,
    compute_together,
)
from lora_kernels.modules.lora_linear import LoRALinear
from lora_kernels.modules.lora_transposed_linear import LoRATransposedLinear
from lora_kernels.modules.quant_linear import QuantLinear
from lora_kernels.modules.quant_lora_linear import QuantLoRALinear

_LAYERS = (nn.Linear, LoRATransposedLinear, QuantLinear)  # LoRALinear is an nn.Linear


def project(layers: Sequence[nn.Module], x: Tensor, given: Given | None = None) -> list[Tensor]:
    """The result of every layer for x. Those that are exactly LoRALinear (all or none with DoRA),
    or all QuantLoRALinear, have no hooks, and agree on dropout and dtypes are one call of the op,
    in which each drops its own elements of x. Frozen nn.Linear beside LoRALinear are part of it.
    `given`: S of x, used where it is of just these adapters.
    """
    together: dict[int, AnyOperands] = {}
    for i, layer in enumerate(layers):
        found = adapted(layer, x)
        first = next(iter(together.values()), found)
        if found is not None and first is not None and agree(first, found):
            together[i] = found
    if together:
        first = next(iter(together.values()))
        for i, layer in enumerate(layers):
            if not isinstance(first, Operands):
                break
            found = grouped_linear.operands(layer, x) if grouped_linear.can_join(layer) else None
            if found is not None and agree(first, found):
                together[i] = found
    results: dict[int, Tensor] = {}
    shrunk = None if given is None else given.of(list(together.values()))
    if len(together) > 1 or shrunk is not None:
        ys = compute_together(x, list(together.values()), shrunk)
        results = dict(zip(together, ys, strict=True))
    return [results[i] if i in results else layer(x) for i, layer in enumerate(layers)]


def make_projection(
    name: str,
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    r: int | Mapping[str, int],
    alpha: float | Mapping[str, float],
    dropout: float | Mapping[str, float],
    rslora: bool,
    quant: str | None,
    adapter_dtype: torch.dtype | None,
    device: Any,
    dtype: torch.dtype | None,
) -> nn.Module:
    """A new layer with the values that the mappings have for `name`; rank 0: frozen, no adapter."""
    rank = _value(r, name, 0)
    where = {"device": device, "dtype": dtype}
    if rank == 0:
        kinds = {} if quant is None else {"format": quant}
        cls: Any = nn.Linear if quant is None else QuantLinear
        return cls(in_features, out_features, bias=bias, **kinds, **where).requires_grad_(False)
    options: dict[str, Any] = {
        "r": rank, "alpha": _value(alpha, name, 2 * rank), "dropout": _value(dropout, name, 0.0),
        "rslora": rslora, "bias": bias, "adapter_dtype": adapter_dtype, **where,
    }  # fmt: skip
    if quant is None:
        return LoRALinear(in_features, out_features, **options)
    return QuantLoRALinear(in_features, out_features, format=quant, **options)


def _value(given: Any, name: str, default: Any) -> Any:
    return given.get(name, default) if isinstance(given, Mapping) else given


def check_names(names: Sequence[str], **mappings: object) -> None:
    """Every key of a mapping must be the name of a projection."""
    for argument, given in mappings.items():
        unknown = sorted(set(given) - set(names)) if isinstance(given, Mapping) else []
        if unknown:
            raise InvalidArgumentError(
                f"{argument} has a value for {unknown[0]!r}; accepted: {', '.join(names)}"
            )


def check_layers(layers: Mapping[str, Any], in_features: int | None = None) -> int:
    """The common in_features of existing layers.

    Raises:
        InvalidArgumentError: a layer of another class, or with another number of inputs.
    """
    for name, layer in layers.items():
        if not isinstance(layer, _LAYERS):
            raise InvalidArgumentError(
                f"{name} is a {type(layer).__name__}; accepted: torch.nn.Linear, LoRALinear, "
                "QuantLinear, QuantLoRALinear, LoRATransposedLinear"
            )
        in_features = layer.in_features if in_features is None else in_features
        if layer.in_features != in_features:
            raise InvalidArgumentError(
                f"{name} has in_features={layer.in_features}; accepted: {in_features}"
            )
    assert in_features is not None
    return in_features
