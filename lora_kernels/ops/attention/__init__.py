from lora_kernels.ops.attention.api import attention
from lora_kernels.ops.attention.decode import attention_decode

__all__ = ["attention", "attention_decode"]
