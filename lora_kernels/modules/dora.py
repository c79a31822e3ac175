"""DoRA in a LoRALinear: rows of the adapted weight rescaled to a learned magnitude.

The forward is :func:`lora_kernels.ops.dora_linear`; here is what merging and a new adapter need.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_kernels.ops import dora_linear

if TYPE_CHECKING:
    from lora_kernels.modules.lora_linear import LoRALinear


@torch.no_grad()
def adapted_weight(layer: LoRALinear, weight: Tensor, sign: float = 1.0) -> Tensor:
    """W + sign s B A [N, K] in fp32, or in fp64 when W or the adapter is."""
    dtype = torch.promote_types(
        torch.promote_types(weight.dtype, layer.lora_A.dtype), torch.float32
    )
    # Autocast would do the product in its own dtype; it knows no meta device.
    with nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False):
        a, b = layer.lora_A.to(dtype), layer.lora_B.to(dtype)
        return torch.addmm(weight.to(dtype), b, a, alpha=sign * layer.scaling)


def weight_norm(layer: LoRALinear) -> Tensor:
    """Row norms [N] of W + s B A, without a graph, in the dtype of :func:`adapted_weight`."""
    return torch.linalg.vector_norm(adapted_weight(layer, layer.weight.detach()), dim=1)


def magnitude_ratio(layer: LoRALinear) -> Tensor:
    """c = m / |V|, [N]; a row of V that is zero has no direction and is left at zero."""
    assert layer.lora_magnitude_vector is not None
    norm = weight_norm(layer)
    return layer.lora_magnitude_vector / norm.masked_fill(norm == 0, 1.0)


def forward(layer: LoRALinear, x: Tensor) -> Tensor:
    """The layer's output ``[..., N]``; x ``[..., K]``."""
    assert layer.lora_magnitude_vector is not None
    return dora_linear(
        x,
        layer.weight,
        layer.lora_A,
        layer.lora_B,
        layer.lora_magnitude_vector,
        layer.scaling,
        bias=layer.bias,
        dropout_p=layer.dropout if layer.training else 0.0,
    )
