"""rope: against transformers' formula in the dtype of the model, and Liger's kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_ops.row import GpuOp, Judge, Keywords, Work
from benchmarks.peers import UnavailableError, load
from lora_kernels.ops import rope
from lora_kernels.testing import RopeInputs, assert_within_budget, rope_inputs
from lora_kernels.testing.rope import results

BF16 = torch.bfloat16


def _judge(i: RopeInputs) -> Judge:
    oracle, low = results(i, torch.float64), results(i, i.q.dtype)

    def check(got: dict[str, Tensor], label: str) -> object:
        return [assert_within_budget(t, oracle[n], low[n], f"{label}: {n}") for n, t in got.items()]

    return check


def _work(i: RopeInputs, provider: str) -> Work:
    leaves = {n: t.detach().requires_grad_() for n, t in i.heads().items()}
    generator = torch.Generator().manual_seed(1)
    upstream = {
        n: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)
        for n, t in leaves.items()
    }
    run = {"eager": _eager, "eager-compile": _eager, "liger": _liger}.get(provider)
    if provider == "eager-compile":
        run = torch.compile(_eager)

    def forward() -> dict[str, Tensor]:
        if run is not None:
            return run(i, leaves)
        q, k = rope(
            leaves["q"], leaves.get("k"), i.cos, i.sin,
            interleaved=i.interleaved, position_ids=i.position_ids, backend=provider,
        )  # fmt: skip
        return {"q": q} if k is None else {"q": q, "k": k}

    if run is not None and (i.interleaved or i.cos.shape[-1] != i.q.shape[-1]):
        raise UnavailableError("written here for half-rotated whole heads")
    if provider == "liger":
        if i.position_ids is not None or i.k is None or i.cos.dim() != 2:
            raise UnavailableError("liger takes q and k and a row of cos and sin per position")
        load("liger_kernel.ops.rope", "LigerRopeFunction")
    return Work(forward, leaves, upstream)


def _eager(i: RopeInputs, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """As transformers has it, in the dtype of the model."""
    cos, sin = i.cos, i.sin
    if i.position_ids is not None:
        cos, sin = cos[i.position_ids], sin[i.position_ids]
    cos, sin = (t.to(i.q.dtype).unsqueeze(-2) for t in (cos, sin))

    def one(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    return {n: one(t) for n, t in leaves.items()}


def _liger(i: RopeInputs, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Heads before positions, cos and sin with a batch axis; its forward works in place."""
    apply = load("liger_kernel.ops.rope", "LigerRopeFunction").apply
    q, k = (leaves[n].transpose(1, 2).clone() for n in ("q", "k"))
    cos, sin = (t.to(q.dtype).unsqueeze(0) for t in (i.cos, i.sin))
    q, k = apply(q, k, cos, sin)
    return {"q": q.transpose(1, 2), "k": k.transpose(1, 2)}


def _problem(i: RopeInputs) -> Keywords:
    q, lead = i.q, i.q.shape[:-2]
    return {
        "B": lead[0] if len(lead) == 2 else 1, "S": lead[-1], "H": q.shape[-2], "D": q.shape[-1],
        "Hk": 0 if i.k is None else i.k.shape[-2], "R": i.cos.shape[-1],
        "interleaved": i.interleaved, "dtype": q.dtype,
    }  # fmt: skip


LLAMA: dict[str, Any] = {"H": 32, "Hk": 8, "D": 128, "dtype": BF16}
ROW = GpuOp(
    name="rope",
    small=(
        {"lead": (2, 9), "H": 4, "Hk": 2, "D": 16, "dtype": BF16},
        {"lead": (1, 37), "H": 3, "Hk": 1, "D": 80, "R": 32, "dtype": torch.float16},
        {"lead": (11,), "H": 5, "Hk": 0, "D": 10, "interleaved": True, "tables": "cache"},
        {"lead": (2, 7), "H": 2, "Hk": 2, "D": 64, "R": 6, "layout": "strided", "tables": "batch"},
        {"lead": (2, 9), "H": 5, "Hk": 1, "D": 32, "R": 16, "interleaved": True, "dtype": BF16},
    ),
    cases={
        "4×2048, 32+8 heads of 128 bfloat16": {"lead": (4, 2048), **LLAMA},
        "64×1, 32+8 heads of 128 bfloat16": {"lead": (64, 1), **LLAMA},
        "4×2048, 32+32 heads of 96, 48 rotated bfloat16": {
            "lead": (4, 2048), "H": 32, "Hk": 32, "D": 96, "R": 48, "dtype": BF16,
        },
        "4×2048, 32+8 heads of 128 interleaved bfloat16": {
            "lead": (4, 2048), "interleaved": True, **LLAMA,
        },
    },
    inputs=rope_inputs,
    judge=_judge,
    work=_work,
    problem=_problem,
    peers=("eager", "eager-compile", "liger"),
)  # fmt: skip
