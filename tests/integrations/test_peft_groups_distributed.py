"""Two gloo processes against one, with layers that are computed together."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from families import FAMILIES
from test_families import GRADIENT_FACTOR
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.modules import layer_group
from lora_kernels.testing import assert_within_budget

pytestmark = pytest.mark.slow
WRAPPERS = {"ddp": 4, "fsdp2": 4, "fsdp2-each-layer": 0}  # grouped calls of two blocks


def _model() -> nn.Module:
    return FAMILIES["llama"].peft_model(torch.float32)


def _ids() -> Tensor:
    return torch.randint(3, 61, (4, 7), generator=torch.Generator().manual_seed(5))


def _step(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model(input_ids=ids).logits.square().mean().backward()
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            found[name.removeprefix("module.")] = grad.clone()
    return found


def _wrap(model: nn.Module, wrapper: str, **options: bool) -> nn.Module:
    lk.apply(model, **options)
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    if wrapper == "fsdp2-each-layer":
        for module in model.modules():
            if hasattr(module, "lora_A"):
                fully_shard(module)
    fully_shard(model)
    return model


def _worker(rank: int, wrapper: str, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        calls, op = [0], layer_group.grouped_lora_linear

        def counted(*args: object, **kwargs: object) -> list[Tensor]:
            calls[0] += 1
            return op(*args, **kwargs)

        layer_group.grouped_lora_linear = counted
        gradients = _step(_wrap(_model(), wrapper), _ids()[2 * rank : 2 * rank + 2])
        if rank == 0:
            torch.save((gradients, calls[0]), f"{folder}/result.pt")
        gc.collect()  # see test_peft_distributed.py
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_of_two_processes_are_those_of_one(wrapper: str, tmp_path: Path) -> None:
    mp.spawn(_worker, (wrapper, str(tmp_path)), nprocs=2)
    gradients, calls = torch.load(tmp_path / "result.pt")
    assert calls == WRAPPERS[wrapper]
    stock = _step(_model(), _ids())
    reference = _step(_model().double(), _ids())
    assert gradients.keys() == stock.keys() and len(stock) == 28
    for name, value in gradients.items():
        assert_within_budget(value, reference[name], stock[name], name)


def _shrink_worker(rank: int, wrapper: str, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        taken, take = [0], layer_group.LayerGroup.take

        def counted(self: layer_group.LayerGroup, *args: object) -> Tensor | None:
            s = take(self, *args)
            taken[0] += s is not None
            return s

        layer_group.LayerGroup.take = counted
        model = _wrap(_model(), wrapper, fused_shrink=True)
        gradients = _step(model, _ids()[2 * rank : 2 * rank + 2])
        if rank == 0:
            torch.save((gradients, taken[0]), f"{folder}/result.pt")
        gc.collect()
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("wrapper", "count"), [("ddp", 4), ("fsdp2", 4), ("fsdp2-each-layer", 0)])
def test_s_made_by_norms(wrapper: str, count: int, tmp_path: Path) -> None:
    """Sharded by block A is there when the norm runs; sharded by layer it is not, and layers make
    their own S."""
    mp.spawn(_shrink_worker, (wrapper, str(tmp_path)), nprocs=2)
    gradients, taken = torch.load(tmp_path / "result.pt")
    assert taken == count
    stock, reference = _step(_model(), _ids()), _step(_model().double(), _ids())
    assert gradients.keys() == stock.keys()
    for name, value in gradients.items():
        assert_within_budget(value, reference[name], stock[name], name, GRADIENT_FACTOR)
