"""Fused low-rank adapter kernels for PyTorch.

Importing this package is silent and needs torch alone; parts that need more (PEFT, transformers,
the compiled CPU library) are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_kernels._version import __version__

# Public name -> module that defines it. Resolved on first use, so that the import stays light.
_PUBLIC = {
    "LoRALinear": "lora_kernels.modules.lora_linear",
    "LoRALSTM": "lora_kernels.modules.lora_lstm",
    "LoRAEmbedding": "lora_kernels.modules.lora_embedding",
    "LoRAConv1d": "lora_kernels.modules.lora_conv",
    "LoRAConv2d": "lora_kernels.modules.lora_conv",
    "LoRAConv3d": "lora_kernels.modules.lora_conv",
    "LoRAQKV": "lora_kernels.modules.lora_qkv",
    "LoRAMLP": "lora_kernels.modules.lora_mlp",
    "LoRAAttention": "lora_kernels.modules.lora_attention",
    "replace_modules": "lora_kernels.modules.replace",
    "save_adapter": "lora_kernels.modules.adapter_io",
    "load_adapter": "lora_kernels.modules.adapter_io",
    "merge": "lora_kernels.modules.merge",
    "unmerge": "lora_kernels.modules.merge",
    "apply": "lora_kernels.integrations.peft",
    "unapply": "lora_kernels.integrations.peft",
    "applied": "lora_kernels.integrations.peft",
    "register_attention": "lora_kernels.integrations.transformers.attention",
    "env": "lora_kernels.environment",
    "explain": "lora_kernels.ops",
    "QuantTensor": "lora_kernels.ops.quant_linear",
    "QuantConfig": "lora_kernels.integrations.transformers",
    "QuantLinear": "lora_kernels.modules.quant_linear",
    "QuantLoRALinear": "lora_kernels.modules.quant_lora_linear",
    "load_quantized": "lora_kernels.modules.quant_checkpoint",
    "save_quantized": "lora_kernels.modules.quant_checkpoint",
}
_SUBMODULES = ("ops", "modules", "training", "errors", "testing")

__all__ = ["__version__", *sorted(_PUBLIC), *_SUBMODULES]

if TYPE_CHECKING:
    from lora_kernels import errors as errors
    from lora_kernels import modules as modules
    from lora_kernels import ops as ops
    from lora_kernels import testing as testing
    from lora_kernels import training as training
    from lora_kernels.environment import env as env
    from lora_kernels.integrations.peft import applied as applied
    from lora_kernels.integrations.peft import apply as apply
    from lora_kernels.integrations.peft import unapply as unapply
    from lora_kernels.integrations.transformers import QuantConfig as QuantConfig
    from lora_kernels.integrations.transformers.attention import (
        register_attention as register_attention,
    )
    from lora_kernels.modules.adapter_io import load_adapter as load_adapter
    from lora_kernels.modules.adapter_io import save_adapter as save_adapter
    from lora_kernels.modules.lora_attention import LoRAAttention as LoRAAttention
    from lora_kernels.modules.lora_conv import LoRAConv1d as LoRAConv1d
    from lora_kernels.modules.lora_conv import LoRAConv2d as LoRAConv2d
    from lora_kernels.modules.lora_conv import LoRAConv3d as LoRAConv3d
    from lora_kernels.modules.lora_embedding import LoRAEmbedding as LoRAEmbedding
    from lora_kernels.modules.lora_linear import LoRALinear as LoRALinear
    from lora_kernels.modules.lora_lstm import LoRALSTM as LoRALSTM
    from lora_kernels.modules.lora_mlp import LoRAMLP as LoRAMLP
    from lora_kernels.modules.lora_qkv import LoRAQKV as LoRAQKV
    from lora_kernels.modules.merge import merge as merge
    from lora_kernels.modules.merge import unmerge as unmerge
    from lora_kernels.modules.quant_checkpoint import load_quantized as load_quantized
    from lora_kernels.modules.quant_checkpoint import save_quantized as save_quantized
    from lora_kernels.modules.quant_linear import QuantLinear as QuantLinear
    from lora_kernels.modules.quant_lora_linear import QuantLoRALinear as QuantLoRALinear
    from lora_kernels.modules.replace import replace_modules as replace_modules
    from lora_kernels.ops import explain as explain
    from lora_kernels.ops.quant_linear import QuantTensor as QuantTensor


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"lora_kernels.{name}")
    else:
        raise AttributeError(f"module 'lora_kernels' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
