"""DDP and FSDP2 on two processes against one process: losses, gradients, trained adapters."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from two_ranks import CASES, RANKS, ROWS, Record, alone, worker

from lora_kernels.ops import _registry
from lora_kernels.testing import assert_within_budget

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)


def usable_backends() -> list[str]:
    spec = _registry.find("lora_linear")
    names = []
    for name in spec.backends:
        problems = [
            spec.problem(M=17, K=48, N=24, rank=4, dtype=d) for d in ("float32", "bfloat16")
        ]
        if all(spec.supports(name, p)[0] for p in problems):
            names.append(name)
    return names


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Record]:
    folder = tmp_path_factory.mktemp("two_ranks")
    mp.spawn(worker, args=(str(folder), usable_backends()), nprocs=RANKS)
    return {k: Record(**v) for k, v in torch.load(folder / "records.pt").items()}


@cache
def one_process(dtype: torch.dtype, compute: torch.dtype | None = None) -> Record:
    return alone(dtype, compute)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", _registry.find("lora_linear").backends)
def test_two_processes_equal_one(records, name, case):
    if (name, case) not in records:
        pytest.skip(f"{name} does not support this problem on this machine")
    got = records[name, case]
    want = one_process(torch.float64)
    low = one_process(torch.float32, torch.bfloat16 if "bf16" in case else None)
    bf16 = torch.bfloat16 if "bf16" in case else torch.float32  # the band of the budget
    for step, (actual, exact, plain) in enumerate(
        zip(got.grads, want.grads, low.grads, strict=True)
    ):
        assert actual.keys() == exact.keys()
        for key, t in actual.items():
            assert t.any(), f"the gradient of {key} is zero"
            assert_within_budget(t, exact[key], plain[key].to(bf16), f"step {step} {key}")
    for key, t in got.adapters.items():
        assert_within_budget(t, want.adapters[key], low.adapters[key].to(bf16), key)
    for actual, exact, plain in zip(got.losses, want.losses, low.losses, strict=True):
        assert_within_budget(actual, exact, plain.to(bf16), "loss")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_of_the_batch_is_noticed(dtype):
    """Control: without the reduction over processes the gradients are outside the budget."""
    want, low = one_process(torch.float64), one_process(torch.float32)
    half = alone(torch.float64, rows=slice(0, ROWS // 2))
    for key, t in half.grads[0].items():
        with pytest.raises(AssertionError, match="budget"):
            assert_within_budget(t, want.grads[0][key], low.grads[0][key].to(dtype), key)
