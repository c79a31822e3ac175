"""LoRALinear as a member of a group of layers that share their input."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_kernels.modules.layer_group import Operands, group_of
from lora_kernels.modules.lora_linear import LoRALinear


class GroupedLoRALinear(LoRALinear):
    """A LoRALinear that asks its group first. No state of its own: a layer becomes one, and
    returns, by assignment of its class."""

    def forward(self, input: Tensor) -> Tensor:
        group = group_of(self)
        y = None if group is None else group.call(self, input)
        return LoRALinear.forward(self, input) if y is None else y

    def _get_name(self) -> str:
        return LoRALinear.__name__


def operands(layer: Any, x: Tensor) -> Operands | None:
    """What a grouped call needs of a LoRALinear; None when its call has to be its own."""
    if layer.merged or not layer.adapter_enabled or layer.lora_magnitude_vector is not None:
        return None
    dropout = layer.dropout if layer.training else 0.0
    return Operands(layer.weight, layer.lora_A, layer.lora_B, layer.scaling, layer.bias, dropout)
