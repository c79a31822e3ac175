"""attention against PyTorch's SDPA and the formula in plain PyTorch, through pytest-benchmark.

    pytest benchmarks/test_bench_attention.py --benchmark-group-by=param:features

Forward and backward of one layer of a small model. Not collected by the default test run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.attention_cpu import sdpa
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops import _registry, attention
from lora_kernels.testing import attention_inputs, check_attention

pytest.importorskip("pytest_benchmark")

B, S, H, HK, D = 1, 1024, 9, 3, 64  # SmolLM2-135M
FEATURES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": (255, 0)},
    "packed": {"causal": True, "lengths": (100, 411, 37, 256, 220)},
    "sinks": {"causal": True, "sinks": True},
    "softcap": {"causal": True, "softcap": 30.0},
}


@pytest.mark.parametrize("provider", ["torch", *_registry.find("attention").backends])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_attention(benchmark, dtype, features, provider):
    arguments = FEATURES[features]
    if provider == "torch":
        if features in ("sinks", "softcap"):
            pytest.skip("SDPA has none")
    else:
        try:
            check_attention(attention_inputs(1, 70, dtype=dtype, Hk=2, **arguments), provider)
        except BackendUnavailableError as error:
            pytest.skip(str(error))
    i = attention_inputs(B, S, H, D, Hk=HK, dtype=dtype, **arguments)
    named = {n: t.requires_grad_() for n, t in i.leaves().items()}

    def step() -> None:
        if provider == "torch":
            out = sdpa(i)
        else:
            out = attention(**named, **i.constants(), **i.options, backend=provider)
        torch.autograd.grad(out, list(named.values()), torch.ones_like(out))

    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(step, rounds=5, iterations=1, warmup_rounds=1)
