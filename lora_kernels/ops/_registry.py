"""Every op, once. Tests, benchmarks, docs and `lk.explain` read it; dispatch never does."""

from __future__ import annotations

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops._shrink_pairs import PAIRS
from lora_kernels.ops._spec import OpSpec
from lora_kernels.ops.attention import problem as attention
from lora_kernels.ops.dora_linear import problem as dora_linear
from lora_kernels.ops.gated_activation import problem as gated_activation
from lora_kernels.ops.linear_cross_entropy import problem as linear_cross_entropy
from lora_kernels.ops.lora_linear import problem as lora_linear
from lora_kernels.ops.lora_qkv import problem as lora_qkv
from lora_kernels.ops.quant_linear import problem as quant_linear
from lora_kernels.ops.rms_norm import problem as rms_norm
from lora_kernels.ops.rope import problem as rope

OPS: tuple[OpSpec, ...] = (
    OpSpec(
        name="attention",
        backends=attention.BACKENDS,
        schemas=(
            "lora_kernels::attention_fwd",
            "lora_kernels::attention_bwd",
            "lora_kernels::attention_decode",
        ),
        problem=attention.AttentionProblem.from_shapes,
        supports=attention.supports,
        choose=attention.choose,
        flops=attention.flops,
        min_bytes=attention.min_bytes,
        deterministic="bitwise from run to run, at a fixed number of threads",
    ),
    OpSpec(
        name="gated_activation",
        backends=gated_activation.BACKENDS,
        schemas=("lora_kernels::gated_activation_fwd", "lora_kernels::gated_activation_bwd"),
        problem=gated_activation.GatedActivationProblem.from_shapes,
        supports=gated_activation.supports,
        choose=gated_activation.choose,
        flops=gated_activation.flops,
        min_bytes=gated_activation.min_bytes,
        deterministic="bitwise from run to run, at a fixed number of threads",
    ),
    OpSpec(
        name="linear_cross_entropy",
        backends=linear_cross_entropy.BACKENDS,
        schemas=(
            "lora_kernels::linear_cross_entropy_fwd",
            "lora_kernels::linear_cross_entropy_grad",
        ),
        problem=linear_cross_entropy.LinearCrossEntropyProblem.from_shapes,
        supports=linear_cross_entropy.supports,
        choose=linear_cross_entropy.choose,
        flops=linear_cross_entropy.flops,
        min_bytes=linear_cross_entropy.min_bytes,
        deterministic="bitwise from run to run, at a fixed number of threads",
    ),
    OpSpec(
        name="lora_linear",
        backends=lora_linear.BACKENDS,
        schemas=("lora_kernels::lora_linear_fwd", "lora_kernels::lora_linear_bwd"),
        problem=lora_linear.LoraLinearProblem.from_shapes,
        supports=lora_linear.supports,
        choose=lora_linear.choose,
        flops=lora_linear.flops,
        min_bytes=lora_linear.min_bytes,
        deterministic="bitwise from run to run, at a fixed number of threads",
    ),
    OpSpec(
        name="quant_linear",
        backends=quant_linear.BACKENDS,
        schemas=(
            "lora_kernels::quant_dequantize",
            "lora_kernels::quant_linear_fwd",
            "lora_kernels::quant_linear_bwd",
        ),
        problem=quant_linear.QuantLinearProblem.from_shapes,
        supports=quant_linear.supports,
        choose=quant_linear.choose,
        flops=quant_linear.flops,
        min_bytes=quant_linear.min_bytes,
        deterministic="bitwise from run to run, at a fixed number of threads",
    ),
    OpSpec(
        name="dora_linear",
        backends=dora_linear.BACKENDS,
        schemas=("lora_kernels::dora_linear_fwd", "lora_kernels::dora_linear_bwd"),
        problem=dora_linear.DoraLinearProblem.from_shapes,
        supports=dora_linear.supports,
        choose=dora_linear.choose,
        flops=dora_linear.flops,
        min_bytes=dora_linear.min_bytes,
        deterministic="bitwise from run to run, at a fixed number of threads",
    ),
    OpSpec(
        name="rms_norm",
        backends=rms_norm.BACKENDS,
        schemas=("lora_kernels::rms_norm_fwd", "lora_kernels::rms_norm_bwd"),
        problem=rms_norm.RmsNormProblem.from_shapes,
        supports=rms_norm.supports,
        choose=rms_norm.choose,
        flops=rms_norm.flops,
        min_bytes=rms_norm.min_bytes,
        deterministic="bitwise from run to run",
    ),
    OpSpec(
        name="lora_qkv",
        backends=lora_qkv.BACKENDS,
        schemas=("lora_kernels::lora_qkv_fwd",),
        problem=lora_qkv.LoraQkvProblem.from_shapes,
        supports=lora_qkv.supports,
        choose=lora_qkv.choose,
        flops=lora_qkv.flops,
        min_bytes=lora_qkv.min_bytes,
        deterministic="bitwise from run to run, at a fixed number of threads",
    ),
    OpSpec(
        name="rope",
        backends=rope.BACKENDS,
        schemas=("lora_kernels::rope_fwd", "lora_kernels::rope_bwd"),
        problem=rope.RopeProblem.from_shapes,
        supports=rope.supports,
        choose=rope.choose,
        flops=rope.flops,
        min_bytes=rope.min_bytes,
        deterministic="bitwise from run to run",
    ),
)


def find(name: str) -> OpSpec:
    for spec in (*OPS, *PAIRS):
        if spec.name == name:
            return spec
    raise InvalidArgumentError(
        f"op={name!r} is unknown; accepted: {', '.join(s.name for s in OPS)}"
    )
