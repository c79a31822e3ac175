"""A frozen linear layer without an adapter beside layers that have one and the same input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lora_kernels.modules.layer_group import Operands, group_of
from lora_kernels.modules.layer_group import has_hooks as has_hooks
from lora_kernels.ops import _dispatch

_PLAIN = (Tensor, nn.Parameter, FakeTensor)
# Where the package's own product of a frozen weight is quicker than the library's.
DTYPE = torch.bfloat16
_ADAPTED_ONLY = ("triton", "cuda")  # backends whose kernels take members with an adapter only


class GroupedLinear(nn.Linear):
    """An nn.Linear that asks its group first. No state of its own: a layer becomes one, and
    returns, by assignment of its class."""

    def forward(self, input: Tensor) -> Tensor:
        group = group_of(self)
        y = None if group is None else group.call(self, input)
        return F.linear(input, self.weight, self.bias) if y is None else y

    def _get_name(self) -> str:
        return nn.Linear.__name__


def can_join(layer: nn.Module | None) -> bool:
    """Exactly nn.Linear, frozen, and nothing watches or replaces its call."""
    if layer is None or type(layer) not in (nn.Linear, GroupedLinear):
        return False
    if "forward" in layer.__dict__:
        return False
    weight = layer._parameters.get("weight")
    return weight is not None and not weight.requires_grad and not has_hooks(layer)


def operands(layer: Any, x: Tensor) -> Operands | None:
    """What a grouped call needs of a layer without an adapter; None when it stays out of the call:
    nothing would be gained (docs/measured_facts.md), its weight trains, is elsewhere, sharded or of
    another dtype, or the kernels asked for want an adapter."""
    weight = layer.weight
    autocast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if (
        x.device.type != "cpu"
        or (torch.get_autocast_dtype("cpu") if autocast else x.dtype) != DTYPE
        or weight.requires_grad
        or weight.device != x.device
        or type(weight) not in _PLAIN
        or weight.dim() != 2
        or (weight.dtype != x.dtype and not autocast)
        or _dispatch.requested_backend(None) in _ADAPTED_ONLY
    ):
        return None
    return Operands(weight, None, None, 1.0, layer.bias, 0.0)
