"""lora_qkv against its two ops one after the other, through pytest-benchmark.

    pytest benchmarks/test_bench_lora_qkv.py --benchmark-group-by=param:dtype

Forward and backward of one layer of a small model. Not collected by the default test run.
"""

from __future__ import annotations

import pytest
import torch

from lora_kernels.ops import _registry, grouped_lora_linear, lora_qkv, rope
from lora_kernels.testing import check_lora_qkv, lora_qkv_inputs

pytest.importorskip("pytest_benchmark")

LEAD, K, H, HK, D, RANK = (4, 256), 576, 9, 3, 64, 16  # SmolLM2-135M


@pytest.mark.parametrize("provider", ["apart", *_registry.find("lora_qkv").backends])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_lora_qkv(benchmark, dtype, provider):
    if provider != "apart":
        spec = _registry.find("lora_qkv")
        able, why = spec.supports(provider, spec.problem(M=1, K=1, H=1, D=2))
        if not able:
            pytest.skip(why)
        check_lora_qkv(lora_qkv_inputs(dtype=dtype), provider)
    # aten by its name would keep the ops inside from their own kernels
    backend = {"aten": None, "apart": None}.get(provider, provider)
    i = lora_qkv_inputs(LEAD, K, H, HK, D, rank=RANK, dtype=dtype, bias=False)
    n, t = i.linear, i.tables
    x = n.x.requires_grad_()
    leaves = [x, *(p.requires_grad_() for p in (*n.lora_as, *n.lora_bs))]

    def heads() -> list[torch.Tensor]:
        if provider == "apart":
            ys = grouped_lora_linear(x, n.weights, n.lora_as, n.lora_bs, n.scalings)
            q, k, v = (y.unflatten(-1, (-1, D)) for y in ys)
            return [*rope(q, k, t.cos, t.sin), v]
        return lora_qkv(
            x, n.weights, n.lora_as, n.lora_bs, n.scalings, t.cos, t.sin, head_dim=D,
            rotated=i.rotated, backend=backend,
        )  # fmt: skip

    def step() -> None:
        outs = heads()
        dys = [dy.view_as(z) for dy, z in zip(n.dys, outs, strict=True)]
        torch.autograd.grad(outs, leaves, dys)

    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(step, rounds=15, iterations=1, warmup_rounds=2)
