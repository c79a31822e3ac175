from lora_kernels.ops.lora_linear.api import grouped_lora_linear, lora_linear

__all__ = ["grouped_lora_linear", "lora_linear"]
