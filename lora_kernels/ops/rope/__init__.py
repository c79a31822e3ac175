from lora_kernels.ops.rope.api import rope
from lora_kernels.ops.rope.in_place import rotate_in_place

__all__ = ["rope", "rotate_in_place"]
