from lora_kernels.ops.lora_linear.api import grouped_lora_linear, lora_linear
from lora_kernels.ops.lora_linear.packing import (
    budget_bytes,
    pack_policy,
    packed_bytes,
    set_pack_policy,
)

__all__ = [
    "budget_bytes",
    "grouped_lora_linear",
    "lora_linear",
    "pack_policy",
    "packed_bytes",
    "set_pack_policy",
]
