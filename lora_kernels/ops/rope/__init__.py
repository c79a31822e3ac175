from lora_kernels.ops.rope.api import rope

__all__ = ["rope"]
