from lora_kernels.ops.gated_activation.api import gated_activation

__all__ = ["gated_activation"]
