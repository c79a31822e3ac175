"""linear_cross_entropy against all logits at once, through pytest-benchmark.

    pytest benchmarks/test_bench_linear_cross_entropy.py --benchmark-group-by=param:dtype

A training step of the head: loss and the gradient of the hidden states. Not collected by the
default test run.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops import linear_cross_entropy
from lora_kernels.testing import check_linear_cross_entropy, linear_cross_entropy_inputs

pytest.importorskip("pytest_benchmark")

TOKENS, HIDDEN, VOCABULARY = 1024, 576, 49152  # SmolLM2-135M, 4 x 256 tokens


@pytest.mark.parametrize("provider", ["torch", "aten", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_linear_cross_entropy(benchmark, dtype, provider):
    if provider != "torch":
        try:
            check_linear_cross_entropy(linear_cross_entropy_inputs(dtype=dtype), provider)
        except BackendUnavailableError as error:
            pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=generator) * HIDDEN**-0.5).to(dtype)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)

    def step() -> None:
        if provider == "torch":
            loss = F.cross_entropy(F.linear(hidden, weight).float(), labels)
        else:
            loss = linear_cross_entropy(hidden, weight, labels, backend=provider)
        torch.autograd.grad(loss, hidden)

    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(step, rounds=7, iterations=1, warmup_rounds=2)
