from lora_kernels.ops.quant_linear.api import (
    dequantize,
    quant_linear,
    quant_lora_linear,
    quantize,
)
from lora_kernels.ops.quant_linear.formats import QuantSpec
from lora_kernels.ops.quant_linear.quant_tensor import QuantTensor

__all__ = [
    "QuantSpec",
    "QuantTensor",
    "dequantize",
    "quant_linear",
    "quant_lora_linear",
    "quantize",
]
