"""QuantLoRALinear under DDP and FSDP2 on two processes, against one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from quant_two_ranks import CASES, RANKS, alone, worker

from lora_kernels.testing import BudgetExceededError, assert_within_budget

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("quant_two_ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=RANKS)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(found, case, monkeypatch):
    """The halves of the batch are added last, so equal to the rounding of the computation."""
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "aten")
    dtype = CASES[case][3]
    want, low = alone(case, torch.float64), alone(case, dtype)
    assert found[case].keys() == want.keys()
    for name, t in found[case].items():
        assert t.any(), name
        if dtype == torch.float32 or name.startswith("grad"):
            assert_within_budget(t, want[name], low[name], f"{case}: {name}")


def test_a_missing_half_of_the_batch_is_noticed(found, monkeypatch):
    """Control: the gradient of one half alone is outside of the budget."""
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "aten")
    want, low = (alone("ddp nf4", dtype) for dtype in (torch.float64, torch.float32))
    half = alone("ddp nf4", torch.float64, rows=slice(0, 8))
    with pytest.raises(BudgetExceededError):
        assert_within_budget(half["grad 0.lora_A"], want["grad 0.lora_A"], low["grad 0.lora_A"])
