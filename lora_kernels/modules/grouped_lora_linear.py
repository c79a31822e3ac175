"""LoRALinear and QuantLoRALinear as a member of a group of layers that share their input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.modules.layer_group import (
    AnyOperands,
    DoraOperands,
    Operands,
    QuantOperands,
    group_of,
)
from lora_kernels.modules.lora_linear import LoRALinear
from lora_kernels.modules.quant_lora_linear import QuantLoRALinear


class GroupedLoRALinear(LoRALinear):
    """A LoRALinear that asks its group first. No state of its own: a layer becomes one, and
    returns, by assignment of its class."""

    def forward(self, input: Tensor) -> Tensor:
        group = group_of(self)
        y = None if group is None else group.call(self, input)
        return LoRALinear.forward(self, input) if y is None else y

    def _get_name(self) -> str:
        return LoRALinear.__name__


class GroupedQuantLoRALinear(QuantLoRALinear):
    """The same of a QuantLoRALinear."""

    def forward(self, input: Tensor) -> Tensor:
        group = group_of(self)
        y = None if group is None else group.call(self, input)
        return QuantLoRALinear.forward(self, input) if y is None else y

    def _get_name(self) -> str:
        return QuantLoRALinear.__name__


GROUPED: dict[Any, Any] = {LoRALinear: GroupedLoRALinear, QuantLoRALinear: GroupedQuantLoRALinear}


def operands(layer: Any, x: Tensor) -> AnyOperands | None:
    """What a grouped call needs of such a layer; None when its call has to be its own."""
    if isinstance(layer, QuantLoRALinear):
        if not layer.adapter_enabled or torch.compiler.is_compiling():
            return None
        return QuantOperands(
            layer.quant_weight, layer.lora_A, layer.lora_B, layer.scaling, layer.bias,
            layer.dropout if layer.training else 0.0, layer.compute_dtype,
        )  # fmt: skip
    if layer.merged or not layer.adapter_enabled:
        return None
    dropout = layer.dropout if layer.training else 0.0
    magnitude = layer.lora_magnitude_vector
    if magnitude is not None:
        if dropout > 0.0 or layer.weight.requires_grad or torch.compiler.is_compiling():
            return None
        return DoraOperands(
            layer.weight, layer.lora_A, layer.lora_B, magnitude, layer.scaling, layer.bias
        )
    return Operands(layer.weight, layer.lora_A, layer.lora_B, layer.scaling, layer.bias, dropout)
