"""rope against transformers' formula, through pytest-benchmark.

    pytest benchmarks/test_bench_rope.py --benchmark-group-by=param:dtype

Forward and backward of one layer of a small model. Not collected by the default test run.
"""

from __future__ import annotations

import pytest
import torch

from lora_kernels.ops import _registry, rope
from lora_kernels.testing import check_rope, rope_inputs

pytest.importorskip("pytest_benchmark")

LEAD, H, HK, D = (4, 256), 9, 3, 64  # SmolLM2-135M


def formula(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """In the dtype of x, as models compute it."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


@pytest.mark.parametrize("provider", ["torch", *_registry.find("rope").backends])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_rope(benchmark, dtype, provider):
    if provider != "torch":
        spec = _registry.find("rope")
        able, why = spec.supports(provider, spec.problem(B=1, S=1, H=1, D=2))
        if not able:
            pytest.skip(why)
        check_rope(rope_inputs(dtype=dtype), provider)
    i = rope_inputs(LEAD, H, D, Hk=HK, dtype=dtype)
    q, k = i.q.requires_grad_(), i.k.requires_grad_()
    cos, sin = (t.to(dtype).unsqueeze(-2) for t in (i.cos, i.sin))

    def step() -> None:
        if provider == "torch":
            outs = formula(q, cos, sin), formula(k, cos, sin)
        else:
            outs = rope(q, k, i.cos, i.sin, backend=provider)
        torch.autograd.grad(outs, (q, k), tuple(torch.ones_like(t) for t in outs))

    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(step, rounds=15, iterations=1, warmup_rounds=2)
