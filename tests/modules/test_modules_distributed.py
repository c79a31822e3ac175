"""LoRALinear under FSDP2: two gloo processes against one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from adapter_models import Net, strengthen

import lora_kernels as lk
from lora_kernels.errors import AdapterFileError, InvalidArgumentError
from lora_kernels.testing import assert_within_budget

WORLD = 2


def build():
    torch.manual_seed(3)
    model = Net()
    lk.replace_modules(model, r=4, alpha=8, modules_to_save=["head"], targets=["up", "down"])
    return strengthen(model), torch.randn(WORLD * 6, 16)


def train_step(model, x):
    model(x).square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def shard_train_save(rank, folder):
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    try:
        model, x = build()
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
        grads = train_step(model, x.chunk(WORLD)[rank])
        whole = {n: g.full_tensor() for n, g in grads.items()}
        lk.save_adapter(model, Path(folder) / "sharded")
        with pytest.raises(InvalidArgumentError, match="sharded"):
            lk.merge(model)
        with pytest.raises(AdapterFileError, match="sharded"):
            lk.load_adapter(model, Path(folder) / "sharded")
        if rank == 0:
            torch.save(whole, Path(folder) / "grads.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_training_and_saving(tmp_path):
    mp.spawn(shard_train_save, (str(tmp_path),), nprocs=WORLD)
    model, x = build()
    lk.save_adapter(model, tmp_path / "whole")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "sharded" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()
    wide = train_step(copy.deepcopy(model).double(), x.double())
    plain = train_step(model, x)
    sharded = torch.load(tmp_path / "grads.pt")
    assert sharded.keys() == plain.keys()
    for name, gradient in sharded.items():
        assert_within_budget(gradient, wide[name], plain[name], name)
