"""transformers models on quantized layers: :class:`QuantConfig` for ``from_pretrained``."""

from __future__ import annotations

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lora_kernels.QuantConfig needs transformers, which is not installed; "
        "pip install 'lora-kernels[hf]'"
    ) from error

from lora_kernels.integrations.transformers.quant_config import QuantConfig
from lora_kernels.integrations.transformers.quantizer import LoraKernelsQuantizer
from lora_kernels.integrations.transformers.registration import register

register()

__all__ = ["LoraKernelsQuantizer", "QuantConfig", "register"]
