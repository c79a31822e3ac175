"""A small LoRA model, one training run of it, and the same run by two gloo processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_kernels as lk

WIDTH, ROWS, STEPS, RANKS = 48, 34, 2, 2


def lora(k: int, n: int, r: int) -> lk.LoRALinear:
    """Scaling 1 and a B that makes the update as large as the frozen output."""
    layer = lk.LoRALinear(k, n, r=r, alpha=r)
    nn.init.normal_(layer.lora_B, std=r**-0.5)
    return layer


class Block(nn.Module):
    """q/k/v as one group over the parameters of three layers, then an MLP of two layers."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.q, self.k, self.v = (lora(WIDTH, n, 4) for n in (WIDTH, 24, 24))
        self.up, self.down = lora(WIDTH, 96, 5), lora(96, WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        group = (self.q, self.k, self.v)
        q, k, v = lk.ops.grouped_lora_linear(
            x,
            [layer.weight for layer in group],
            [layer.lora_A for layer in group],
            [layer.lora_B for layer in group],
            [layer.scaling for layer in group],
            biases=[layer.bias for layer in group],
            backend=self.backend,
        )
        x = x + q * torch.cat([k, v], -1).sigmoid()
        return x + self.down(nn.functional.silu(self.up(x)))


def build(backend: str) -> nn.Sequential:
    """Two equal blocks, the same at every call."""
    torch.manual_seed(5)
    return nn.Sequential(Block(backend), Block(backend))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return tuple(torch.randn(STEPS, ROWS, WIDTH, generator=generator) for _ in range(2))


@dataclass
class Record:
    """Losses and gradients of every step, adapters at the end; full tensors in fp32 or fp64."""

    losses: list[Tensor]
    grads: list[dict[str, Tensor]]
    adapters: dict[str, Tensor]


def full(t: Tensor) -> Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def train(model: nn.Module, xs: Tensor, ys: Tensor) -> Record:
    """SGD on the adapters; names lose the prefix that a wrapper adds."""
    named = [(n.removeprefix("module."), p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for _, p in named], lr=0.05)
    losses, grads = [], []
    for x, y in zip(xs, ys, strict=True):
        optimizer.zero_grad()
        loss = (model(x).to(y.dtype) - y).square().mean()
        loss.backward()
        losses.append(loss.detach())
        grads.append({n: full(p.grad) for n, p in named})
        optimizer.step()
    return Record(losses, grads, {n: full(p) for n, p in named})


def alone(
    dtype: torch.dtype, compute: torch.dtype | None = None, rows: slice = slice(None)
) -> Record:
    """The whole batch, or some rows, in one process on the reference backend.

    `compute` is the dtype of the forward where it differs from that of the parameters.
    """
    xs, ys = (t[:, rows].to(dtype) for t in data())
    model = build("reference").to(dtype)
    return train(model if compute is None else Cast(model, compute), xs, ys)


class Cast(nn.Module):
    """Runs a model in another dtype than its parameters have, by differentiable copies."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = model
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        cast = {n: p.to(self.dtype) for n, p in self.module.named_parameters()}
        return torch.func.functional_call(self.module, cast, (x.to(self.dtype),))


CASES = ("ddp", "fsdp2", "fsdp2-bf16")


def wrap(model: nn.Module, case: str) -> nn.Module:
    if case == "ddp":
        return DistributedDataParallel(model)
    policy = MixedPrecisionPolicy()
    if case == "fsdp2-bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


def worker(rank: int, folder: str, backends: list[str]) -> None:
    """Half of every batch per rank; rank 0 writes all records."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    xs, ys = (t.chunk(RANKS, 1)[rank] for t in data())
    records = {}
    for backend in backends:
        for case in CASES:
            record = train(wrap(build(backend), case), xs, ys)
            for loss in record.losses:
                dist.all_reduce(loss)
                loss /= RANKS
            records[backend, case] = record
    if rank == 0:
        torch.save({key: vars(r) for key, r in records.items()}, Path(folder) / "records.pt")
    dist.destroy_process_group()
