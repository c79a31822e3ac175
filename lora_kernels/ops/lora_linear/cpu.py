"""lora_linear on the compiled CPU library."""

from __future__ import annotations

from lora_kernels.ops.lora_linear.problem import LoraLinearProblem


def supports(problem: LoraLinearProblem) -> tuple[bool, str]:
    return False, "lora_kernels._C is not built"


def preferred(problem: LoraLinearProblem) -> tuple[bool, str]:
    return supports(problem)
