"""DoRA over the fused op: rows of the adapted weight rescaled to a learned magnitude.

With V = W + s B A, c = m / |V| (row norms, taken as a constant) and D the dropped input,

    y = x W^T + bias + (c - 1) D W^T + c s D A^T B^T
      = (x - D) W^T + bias + c (D W^T + s D A^T B^T)

which is bias + c (x V^T) without dropout. m gets its gradient through c, A and B through the
second term. Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation"
(arXiv 2402.09353), section 4.3 for the constant norm.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.ops import lora_linear

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
    ratio = magnitude_ratio(layer)
    drops = layer.training and layer.dropout > 0.0
    kept = F.dropout(x, layer.dropout) if drops else x
    y = lora_linear(kept, layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
    # ratio stays in fp32: one rounding of the product, and an fp32 gradient for the magnitude.
    scaled = y * ratio
    if drops:
        scaled = scaled + F.linear(x - kept, layer.weight)
    if layer.bias is not None:
        scaled = scaled + layer.bias
    return scaled.to(y.dtype)
