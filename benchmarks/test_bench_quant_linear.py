"""The benchmark of quant_linear through pytest-benchmark.

    pytest benchmarks/test_bench_quant_linear.py --benchmark-group-by=param:shape,param:rows

Not collected by the default test run. Every result is held to the error budget before it is timed.
"""

from __future__ import annotations

import pytest
import torch

from lora_kernels.errors import BackendUnavailableError
from lora_kernels.ops import _registry, quant_linear
from lora_kernels.testing import check_quant_linear, quant_linear_inputs

pytest.importorskip("pytest_benchmark")

SHAPES = [(4096, 4096), (1536, 576)]


@pytest.mark.parametrize("backend", _registry.find("quant_linear").backends)
@pytest.mark.parametrize("rows", [1, 16, 512])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("format", ["nf4", "int8", "int4", "fp8"])
def test_quant_linear(benchmark, format, shape, rows, backend):
    n, k = shape
    inputs = quant_linear_inputs(rows, k, n, 0, torch.bfloat16, format=format, bias=False)
    try:
        margins = check_quant_linear(inputs, backend)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    benchmark.extra_info.update(
        share_of_error_budget=round(max(m.max_norm for m in margins.values()), 3),
        packed_bytes=inputs.q.nbytes,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
    call = (inputs.dense.x, inputs.q)
    benchmark.pedantic(
        quant_linear, call, {"backend": backend}, rounds=10, iterations=2, warmup_rounds=3
    )
