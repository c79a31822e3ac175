"""A QLoRA model trained by one process and by two, wrapped in DDP and FSDP2."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_kernels as lk
from lora_kernels.modules.quant_linear import QuantLinear

RANKS, ROWS, STEPS = 2, 16, 2
# Wrapper, format, quant_storage, dtype of the computation.
CASES: dict[str, tuple[str, str, torch.dtype | None, torch.dtype]] = {
    "ddp nf4": ("ddp", "nf4", None, torch.float32),
    "ddp int4": ("ddp", "int4", None, torch.float32),
    "fsdp2 nf4": ("fsdp2", "nf4", None, torch.float32),
    "fsdp2 nf4 in float32 storage": ("fsdp2", "nf4", torch.float32, torch.float32),
    "fsdp2 int8": ("fsdp2", "int8", None, torch.float32),
    "fsdp2 fp8": ("fsdp2", "fp8", None, torch.float32),
    "fsdp2 nf4, bf16": ("fsdp2", "nf4", None, torch.bfloat16),
    "fsdp2 nf4 in bf16 storage, bf16": ("fsdp2", "nf4", torch.bfloat16, torch.bfloat16),
}


def build(case: str) -> nn.Sequential:
    """Two adapted layers; odd sizes, so that no shard ends where a row does."""
    _, format, storage, _ = CASES[case]
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(40, 54), nn.ReLU(), nn.Linear(54, 6))
    for i in (0, 2):
        model[i] = QuantLinear.from_linear(model[i], format, quant_storage=storage)
    lk.replace_modules(model, r=3, alpha=3)
    for i in (0, 2):
        nn.init.normal_(model[i].lora_B, std=0.5)
    return model


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(STEPS, ROWS, 40, generator=generator)
    return x, torch.randn(STEPS, ROWS, 6, generator=generator)


def train(model: nn.Module, xs: Tensor, ys: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of the first step and adapters at the end, whole tensors by name."""
    named = [(n.removeprefix("module."), p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for _, p in named], lr=0.05)
    found: dict[str, Tensor] = {}
    for step, (x, y) in enumerate(zip(xs, ys, strict=True)):
        output = model(x.to(dtype))
        loss = (output - y.to(output.dtype)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            found |= {f"grad {n}": full(p.grad) for n, p in named}
        optimizer.step()
    return found | {n: full(p) for n, p in named}


def full(t: Tensor) -> Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def alone(case: str, dtype: torch.dtype, rows: slice = slice(None)) -> dict[str, Tensor]:
    """One process, all of it in `dtype`; the packed weights are the same in every dtype."""
    xs, ys = data()
    return train(build(case).to(dtype), xs[:, rows], ys[:, rows], dtype)


def worker(rank: int, folder: str) -> None:
    os.environ["LORA_KERNELS_BACKEND"] = "aten"
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    store = dist.FileStore(str(Path(folder) / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    part = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
    xs, ys = data()
    found = {}
    for case, (wrapper, _, _, dtype) in CASES.items():
        model = build(case)
        before = [model[i].quant_weight.clone() for i in (0, 2)]
        if wrapper == "ddp":
            if rank:  # DDP broadcasts packed data and statistics from the first process
                with torch.no_grad():
                    model[0].weight.zero_()
            wrapped = DistributedDataParallel(model)
        else:
            policy = MixedPrecisionPolicy(
                param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
            )
            for i in (0, 2):
                fully_shard(model[i], mp_policy=policy)
            wrapped = fully_shard(model, mp_policy=policy)
        found[case] = train(wrapped, xs[:, part], ys[:, part], dtype)
        if wrapper == "ddp":
            assert all(model[i].quant_weight.equal(q) for i, q in zip((0, 2), before, strict=True))
        elif "fp8" not in case:  # gloo gathers no float8
            state = {k: full_bytes(v) for k, v in wrapped.state_dict().items()}
            plain = build(case)
            plain.load_state_dict(state)
            assert all(plain[i].quant_weight.equal(q) for i, q in zip((0, 2), before, strict=True))
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def full_bytes(t: Tensor) -> Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
