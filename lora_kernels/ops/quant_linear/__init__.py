from lora_kernels.ops.quant_linear.api import (
    dequantize,
    quant_linear,
    quant_lora_linear,
    quantize,
)
from lora_kernels.ops.quant_linear.checkpoint import (
    Hints,
    from_state_dict,
    quantized_layers,
    read_layer,
    to_state_dict,
)
from lora_kernels.ops.quant_linear.checkpoint_bitsandbytes import pack_storage, unpack_storage
from lora_kernels.ops.quant_linear.checkpoint_keys import Reader
from lora_kernels.ops.quant_linear.formats import QuantSpec, parts_of
from lora_kernels.ops.quant_linear.grouped import grouped_quant_lora_linear
from lora_kernels.ops.quant_linear.problem import FORMAT_NAMES
from lora_kernels.ops.quant_linear.quant_tensor import QuantTensor
from lora_kernels.ops.quant_linear.validate import make_spec

__all__ = [
    "FORMAT_NAMES",
    "Hints",
    "QuantSpec",
    "QuantTensor",
    "Reader",
    "dequantize",
    "from_state_dict",
    "grouped_quant_lora_linear",
    "make_spec",
    "pack_storage",
    "parts_of",
    "quant_linear",
    "quant_lora_linear",
    "quantize",
    "quantized_layers",
    "read_layer",
    "to_state_dict",
    "unpack_storage",
]
