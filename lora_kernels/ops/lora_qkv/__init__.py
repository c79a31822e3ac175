from lora_kernels.ops.lora_qkv.api import lora_qkv

__all__ = ["lora_qkv"]
