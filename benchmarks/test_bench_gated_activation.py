"""gated_activation against eager PyTorch, through pytest-benchmark.

    pytest benchmarks/test_bench_gated_activation.py --benchmark-group-by=param:dtype

Forward and backward of one MLP of a small model. Not collected by the default test run.
"""

from __future__ import annotations

import pytest
import torch

from lora_kernels.ops import _registry, gated_activation
from lora_kernels.testing import check_gated_activation, gated_activation_inputs
from lora_kernels.testing.gated_activation import formula

pytest.importorskip("pytest_benchmark")

SHAPE = (4, 256, 1536)  # SmolLM2-135M


@pytest.mark.parametrize("provider", ["torch", *_registry.find("gated_activation").backends])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_gated_activation(benchmark, dtype, provider):
    if provider != "torch":
        check_gated_activation(gated_activation_inputs(dtype=dtype), provider)
    i = gated_activation_inputs(SHAPE, dtype=dtype)
    gate, up = i.gate.requires_grad_(), i.up.requires_grad_()
    dh = torch.ones_like(gate)

    def step() -> None:
        if provider == "torch":
            h = formula(gate, up, "silu")
        else:
            h = gated_activation(gate, up, backend=provider)
        torch.autograd.grad(h, (gate, up), dh)

    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(step, rounds=15, iterations=1, warmup_rounds=2)
