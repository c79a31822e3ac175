"""Every op, once. Tests, benchmarks, docs and `lk.explain` read it; dispatch never does."""

from __future__ import annotations

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops._spec import OpSpec
from lora_kernels.ops.lora_linear import problem as lora_linear

OPS: tuple[OpSpec, ...] = (
    OpSpec(
        name="lora_linear",
        backends=("reference", "aten", "cpu", "triton", "cuda"),
        schemas=("lora_kernels::lora_linear_fwd", "lora_kernels::lora_linear_bwd"),
        problem=lora_linear.LoraLinearProblem.from_shapes,
        supports=lora_linear.supports,
        choose=lora_linear.choose,
        flops=lora_linear.flops,
        min_bytes=lora_linear.min_bytes,
        deterministic="bitwise from run to run, at a fixed number of threads",
    ),
)


def find(name: str) -> OpSpec:
    for spec in OPS:
        if spec.name == name:
            return spec
    raise InvalidArgumentError(
        f"op={name!r} is unknown; accepted: {', '.join(s.name for s in OPS)}"
    )
