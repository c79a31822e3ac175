"""rms_norm against eager PyTorch, through pytest-benchmark.

    pytest benchmarks/test_bench_rms_norm.py --benchmark-group-by=param:dtype

Forward and backward of one norm of a small model, its weight frozen. `torch` is the composition
that transformers' models spell out, `torch.rms_norm` the library's function. Not collected by the
default test run.
"""

from __future__ import annotations

import pytest
import torch

from lora_kernels.ops import _registry, rms_norm
from lora_kernels.testing import check_rms_norm, rms_norm_inputs

pytest.importorskip("pytest_benchmark")

SHAPE = (4, 256, 576)  # SmolLM2-135M
EPS = 1e-5


def composition(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


@pytest.mark.parametrize(
    "provider", ["torch", "torch.rms_norm", *_registry.find("rms_norm").backends]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_rms_norm(benchmark, dtype, provider):
    if not provider.startswith("torch"):
        spec = _registry.find("rms_norm")
        able, why = spec.supports(provider, spec.problem(M=1024, K=576, dtype=dtype))
        if not able:
            pytest.skip(why)
        check_rms_norm(rms_norm_inputs(dtype=dtype), provider)
    i = rms_norm_inputs(SHAPE, dtype=dtype)
    x, weight = i.x.requires_grad_(), i.weight
    dy = torch.ones_like(x)

    def step() -> None:
        if provider == "torch":
            y = composition(x, weight)
        elif provider == "torch.rms_norm":
            y = torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, EPS)
        else:
            y = rms_norm(x, weight, EPS, backend=provider)
        torch.autograd.grad(y, x, dy)

    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(step, rounds=15, iterations=1, warmup_rounds=2)
