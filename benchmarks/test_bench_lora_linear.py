"""The benchmark of lora_linear through pytest-benchmark.

    pytest benchmarks/test_bench_lora_linear.py --benchmark-group-by=param:shape,param:mode

Not collected by the default test run. Ratios and the interleaved protocol: `benchmarks.run`.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import providers
from benchmarks.gate import Gate
from benchmarks.providers import Case

pytest.importorskip("pytest_benchmark")

SHAPES = [(512, 2048, 2048), (1024, 576, 1536), (1024, 1536, 576)]


@pytest.fixture(params=SHAPES, ids=lambda s: "x".join(map(str, s)))
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return request.param


@pytest.mark.parametrize("provider", providers.DEFAULT)
@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_lora_linear(benchmark, shape, dtype, mode, provider):
    case = Case(*shape, rank=16, dtype=dtype)
    try:
        built = providers.build(provider, case)
    except providers.UnavailableError as error:
        pytest.skip(str(error))
    margin = Gate().check(built, case)  # raises before anything is timed
    benchmark.extra_info.update(
        share_of_error_budget=round(max(margin.max_norm, margin.rms), 3),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
    benchmark.pedantic(getattr(built, mode), rounds=10, iterations=2, warmup_rounds=3)
