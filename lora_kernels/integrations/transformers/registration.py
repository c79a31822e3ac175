"""Make ``from_pretrained`` know :class:`QuantConfig`, for checkpoints of other methods as well."""

from __future__ import annotations

from typing import Any

from transformers.quantizers import auto

from lora_kernels.integrations.transformers.quant_config import METHOD, QuantConfig
from lora_kernels.integrations.transformers.quantizer import LoraKernelsQuantizer


class _PassedConfigDecides(auto.AutoHfQuantizer):
    """AutoHfQuantizer, except that a QuantConfig passed by the caller reads any checkpoint.

    transformers has no registration for that: it takes the configuration of the checkpoint, which
    for bitsandbytes, GPTQ and AWQ needs those packages, and refuses another class beside it.
    """

    @classmethod
    def merge_quantization_configs(
        cls, quantization_config: Any, quantization_config_from_args: Any
    ) -> Any:
        if isinstance(quantization_config_from_args, QuantConfig):
            if isinstance(quantization_config, QuantConfig):
                return quantization_config
            stored = (
                quantization_config
                if isinstance(quantization_config, dict)
                else quantization_config.to_dict()
            )
            return quantization_config_from_args.for_checkpoint(stored)
        return super().merge_quantization_configs(
            quantization_config, quantization_config_from_args
        )


def register() -> None:
    """Register the method ``lora_kernels`` with transformers; again does nothing."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(QuantConfig)
        auto.register_quantizer(METHOD)(LoraKernelsQuantizer)
    if not issubclass(auto.AutoHfQuantizer, _PassedConfigDecides):
        auto.AutoHfQuantizer = _PassedConfigDecides  # type: ignore[misc]
