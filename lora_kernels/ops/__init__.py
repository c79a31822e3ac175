"""Functional ops: safe under autograd, torch.compile, autocast, checkpointing, DDP and FSDP2."""

from __future__ import annotations

from lora_kernels.ops._explain import explain
from lora_kernels.ops.lora_linear import grouped_lora_linear, lora_linear

__all__ = ["explain", "grouped_lora_linear", "lora_linear"]
