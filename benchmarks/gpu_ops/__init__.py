"""What make gpu-check runs of each op with kernels for GPUs: one row per op, one file per row.

A new op (or a new GPU backend of one) needs a file here whose ROW says which problems it is
checked and timed on; everything else (tests on the device, sanitizer, benchmark, record, the
table that `auto` reads) follows from it. row.py says what a row is.
"""

from __future__ import annotations

from benchmarks.gpu_ops import (
    activation_shrink,
    attention,
    gated_activation,
    linear_cross_entropy,
    lora_linear,
    lora_qkv,
    norm_shrink,
    quant_linear,
    rms_norm,
    rope,
)
from benchmarks.gpu_ops.row import GpuOp

ROWS: dict[str, GpuOp] = {
    row.name: row
    for row in (
        lora_linear.ROW,
        attention.ROW,
        quant_linear.ROW,
        linear_cross_entropy.ROW,
        rope.ROW,
        lora_qkv.ROW,
        gated_activation.ROW,
        rms_norm.ROW,
        norm_shrink.ROW,
        activation_shrink.ROW,
    )
}
