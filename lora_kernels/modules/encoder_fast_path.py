"""torch's fused encoder path, which would skip an adapter without a word.

In evaluation nn.TransformerEncoderLayer may run one fused kernel on linear1.weight and
linear2.weight and never call the layers; nn.TransformerEncoder then also packs its input into a
nested tensor that only that kernel takes. Both read the attributes that are cleared here.
"""

from __future__ import annotations

from torch import nn

from lora_kernels.modules.lora_linear import LoRALinear
from lora_kernels.modules.quant_linear import QuantLinear


def disable_where_adapted(model: nn.Module) -> None:
    """Make every encoder of `model` that holds a LoRALinear call its layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _adapted(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and _adapted(module):
            module.use_nested_tensor = False


def _adapted(module: nn.Module) -> bool:
    return any(isinstance(child, (LoRALinear, QuantLinear)) for child in module.modules())
