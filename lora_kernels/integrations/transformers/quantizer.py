"""The HfQuantizer that puts QuantLinear layers into a model while it is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.integrations.transformers.quant_config import QuantConfig
from lora_kernels.integrations.transformers.weight_ops import (
    QuantizeDense,
    ReadQuantized,
    is_linear,
)
from lora_kernels.modules.quant_linear import QuantLinear
from lora_kernels.modules.replace import install

_BITSANDBYTES = [
    "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
    "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4", "SCB", "weight_format",
]  # fmt: skip
# Endings of the keys that make one weight, by the method of the checkpoint.
_KEYS = {
    "bitsandbytes": _BITSANDBYTES,
    "gptq": ["qweight", "qzeros", "scales", "g_idx"],
    "awq": ["qweight", "qzeros", "scales"],
    "fp8": ["weight", "weight_scale", "weight_scale_inv"],
    "lora_kernels": ["weight", "weight_scale"],
}
_BITS = {"int8": 8, "fp8": 8, "fp8_row": 8, "fp8_tensor": 8, "fp8_block": 8}


class LoraKernelsQuantizer(HfQuantizer):
    """Quantizes on the fly, or reads a checkpoint that is quantized; see :class:`QuantConfig`."""

    quantization_config: QuantConfig
    requires_calibration = False

    def __init__(self, quantization_config: QuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.skip: list[str] = []

    @property
    def quantized_element_size(self) -> float | None:
        return _BITS.get(self.quantization_config.format or "nf4", 4) / 8

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """What makes transformers.Trainer accept adapters that are not PEFT's."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise InvalidArgumentError(
                "device_map puts layers on the disk; quantized layers stay in memory"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.skip = self.get_modules_to_not_convert(
            model,
            self.quantization_config.skip_modules,
            list(model._keep_in_fp32_modules or ()),
        )
        return model

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        path, _, name = param_name.rpartition(".")
        if name != "weight" or self.pre_quantized:
            return False
        try:
            module = model.get_submodule(path)
        except AttributeError:
            return False
        return is_linear(module) and should_convert_module(path, self.skip)

    def get_quantize_ops(self) -> QuantizeDense:
        return QuantizeDense(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        checkpoint = self.quantization_config.checkpoint
        if not self.pre_quantized:
            return []
        method = "lora_kernels" if checkpoint is None else checkpoint.get("quant_method")
        keys = _KEYS[getattr(method, "value", method) or "bitsandbytes"]
        return [WeightConverter(list(keys), "weight", [ReadQuantized(self)])]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Saving would run the conversions backwards; the state dict has the checkpoint's keys.
        model._weight_conversions = [
            c for c in getattr(model, "_weight_conversions", None) or []
            if not any(isinstance(op, ReadQuantized) for op in getattr(c, "operations", ()))
        ] or None  # fmt: skip
        if not any(isinstance(m, QuantLinear) for m in model.modules()):
            raise InvalidArgumentError(
                "no linear layer of the model was quantized; check skip_modules and the checkpoint"
            )
        config = self.quantization_config
        if config.r is not None:
            options = {"r": config.r, "alpha": config.alpha, "dropout": config.dropout}
            layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
            install(model, dict.fromkeys(layers, options), trainable=[])
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, module in list(model.named_modules()):
            if type(module) is QuantLinear:
                model.set_submodule(name, module.dequantize(dtype))
        return model
