from lora_kernels.ops.lora_linear.api import grouped_lora_linear, lora_linear
from lora_kernels.ops.lora_linear.packing import (
    budget_bytes,
    pack_policy,
    packed_bytes,
    set_pack_policy,
)
from lora_kernels.ops.lora_linear.padded_block import PaddedBlock
from lora_kernels.ops.lora_linear.padded_linear import padded_lora_linear

__all__ = [
    "PaddedBlock",
    "budget_bytes",
    "grouped_lora_linear",
    "lora_linear",
    "pack_policy",
    "packed_bytes",
    "padded_lora_linear",
    "set_pack_policy",
]
