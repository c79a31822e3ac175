"""dora_linear through pytest-benchmark, beside the plain PyTorch formula.

    pytest benchmarks/test_bench_dora_linear.py --benchmark-group-by=param:shape,param:mode

Not collected by the default test run. Nothing is timed before its result passed its budget.
"""

from __future__ import annotations

import pytest
import torch

from lora_kernels.testing import check_dora_linear, dora_linear_inputs, dora_linear_op
from lora_kernels.testing.dora_linear import dora_linear_results

pytest.importorskip("pytest_benchmark")

SHAPES = [(512, 2048, 2048), (1024, 576, 1536)]


@pytest.mark.parametrize("provider", ["auto", "aten", "reference", "plain"])
@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_dora_linear(benchmark, shape, dtype, mode, provider):
    inputs = dora_linear_inputs(*shape, rank=16, dtype=dtype)
    needs = "" if mode == "fwd" else "xabm"
    if provider == "plain":

        def call() -> object:
            return dora_linear_results(inputs, dtype, needs)

    else:
        backend = None if provider == "auto" else provider
        check_dora_linear(inputs, backend, needs)

        def call() -> object:
            return dora_linear_op(inputs, backend, needs)

    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(call, rounds=10, iterations=2, warmup_rounds=3)
