"""Functional ops: safe under autograd, torch.compile, autocast, checkpointing, DDP and FSDP2."""

from __future__ import annotations

from lora_kernels.ops import _mkl_dispatch
from lora_kernels.ops._explain import explain
from lora_kernels.ops.attention import attention, attention_decode
from lora_kernels.ops.dora_linear import dora_linear
from lora_kernels.ops.gated_activation import gated_activation
from lora_kernels.ops.linear_cross_entropy import linear_cross_entropy
from lora_kernels.ops.lora_linear import grouped_lora_linear, lora_linear
from lora_kernels.ops.lora_qkv import lora_qkv
from lora_kernels.ops.quant_linear import dequantize, quant_linear, quant_lora_linear, quantize
from lora_kernels.ops.rms_norm import rms_norm
from lora_kernels.ops.rope import rope

__all__ = [
    "attention",
    "attention_decode",
    "dequantize",
    "dora_linear",
    "explain",
    "gated_activation",
    "grouped_lora_linear",
    "linear_cross_entropy",
    "lora_linear",
    "lora_qkv",
    "quant_linear",
    "quant_lora_linear",
    "quantize",
    "rms_norm",
    "rope",
]

_mkl_dispatch.settle()
