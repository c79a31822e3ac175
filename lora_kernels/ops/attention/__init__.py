from lora_kernels.ops.attention.api import attention

__all__ = ["attention"]
