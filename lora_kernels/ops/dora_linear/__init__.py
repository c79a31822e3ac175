from lora_kernels.ops.dora_linear.api import dora_linear
from lora_kernels.ops.dora_linear.grouped import grouped_dora_linear
from lora_kernels.ops.dora_linear.row_norm import row_norm

__all__ = ["dora_linear", "grouped_dora_linear", "row_norm"]
