"""Two gloo processes against one: DDP and FSDP2 around fused layers give the same gradients."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft_models import Calls, as_fp64, mlp
from torch import nn

import lora_kernels as lk
from lora_kernels.integrations.peft import FusedLoraLinear, fallback, linear
from lora_kernels.testing import assert_within_budget

pytestmark = pytest.mark.slow
_ROWS = 6


def _inputs() -> torch.Tensor:
    return torch.randn(2 * _ROWS, 20, generator=torch.Generator().manual_seed(9))


def _count_calls() -> Calls:
    calls, op = Calls(), linear.lora_linear

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        calls.count += 1
        return op(*args, **kwargs)

    linear.lora_linear = counted
    return calls


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    def whole(t: torch.Tensor) -> torch.Tensor:
        return t.full_tensor() if hasattr(t, "full_tensor") else t

    return {
        n.removeprefix("module."): whole(p.grad).clone()
        for n, p in model.named_parameters()
        if p.grad is not None
    }


def _ddp(model: nn.Module) -> nn.Module:
    lk.apply(model)
    return nn.parallel.DistributedDataParallel(model)


def _shard(model: nn.Module, *, each_layer: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    if each_layer:
        for name in ("up", "mid", "down"):
            fully_shard(getattr(model.base_model.model, name))
    fully_shard(model)


def _fsdp(model: nn.Module) -> nn.Module:
    lk.apply(model)
    _shard(model, each_layer=False)
    return model


def _fsdp_then_apply(model: nn.Module) -> nn.Module:
    _shard(model, each_layer=False)
    assert len(lk.apply(model).fused) == 3
    return model


def _fsdp_each_layer(model: nn.Module) -> nn.Module:
    lk.apply(model)
    _shard(model, each_layer=True)
    assert len(lk.apply(model).fused) == 3
    return model


def _fsdp_each_layer_then_apply(model: nn.Module) -> nn.Module:
    _shard(model, each_layer=True)
    assert len(lk.apply(model).fused) == 3
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": _ddp,
    "fsdp2": _fsdp,
    "fsdp2-then-apply": _fsdp_then_apply,
    "fsdp2-each-layer": _fsdp_each_layer,
    "fsdp2-each-layer-then-apply": _fsdp_each_layer_then_apply,
}


def _worker(rank: int, wrapper: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", LORA_KERNELS_STRICT="1")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        result = _train_step(rank, WRAPPERS[wrapper])
        if rank == 0:
            torch.save(result, f"{folder}/result.pt")
        # DDP's reducer must be gone by now: when it is the last to hold the process group, its
        # destructor can wait for a thread of gloo that waits for the interpreter lock.
        gc.collect()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _train_step(rank: int, wrap: Callable[[nn.Module], nn.Module]) -> tuple[object, ...]:
    """Gradients, the number of layers that unapply restored, and of those it left fused."""
    calls = _count_calls()
    base = mlp()
    model = wrap(base)
    share = _inputs()[rank * _ROWS : (rank + 1) * _ROWS]
    model(share).square().mean().backward()
    assert calls.take() == 3, "not every layer ran fused"
    assert not fallback._warned
    gradients = _gradients(model)
    restored = lk.unapply(model)
    return gradients, restored, sum(isinstance(m, FusedLoraLinear) for m in base.modules())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_of_two_processes_are_those_of_one(wrapper: str, tmp_path: Path) -> None:

    def one_process(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        model(x).square().mean().backward()
        return _gradients(model)

    mp.spawn(_worker, (wrapper, str(tmp_path)), nprocs=2)
    gradients, restored, left = torch.load(tmp_path / "result.pt")
    assert (restored, left) == (3, 0)
    model = mlp()
    reference = one_process(as_fp64(model), _inputs().double())
    stock = one_process(model, _inputs())
    assert gradients.keys() == stock.keys() and len(stock) == 6
    for name, value in gradients.items():
        assert_within_budget(value, reference[name], stock[name], name)
