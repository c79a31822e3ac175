"""Operator pairs for modules that are autograd nodes of their own: forward and backward of an op as
its contract has them, past the dispatcher where nobody watches it."""

from __future__ import annotations

from lora_kernels.ops.gated_activation.contract import bwd as gated_activation_bwd
from lora_kernels.ops.gated_activation.contract import fwd as gated_activation_fwd
from lora_kernels.ops.lora_linear.contract import bwd as lora_linear_bwd
from lora_kernels.ops.lora_linear.contract import fwd as lora_linear_fwd

__all__ = ["gated_activation_bwd", "gated_activation_fwd", "lora_linear_bwd", "lora_linear_fwd"]
