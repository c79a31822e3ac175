"""lora_qkv: against its two ops one after the other, and plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_ops.row import GpuOp, Judge, Keywords, Work
from lora_kernels.ops import grouped_lora_linear, lora_qkv, rope
from lora_kernels.testing import LoraQkvInputs, assert_within_budget, lora_qkv_inputs
from lora_kernels.testing.lora_qkv import FACTOR, GRADIENT_FACTOR, results

BF16 = torch.bfloat16


def _judge(i: LoraQkvInputs) -> Judge:
    oracle, low = results(i, torch.float64, "xab"), results(i, i.linear.x.dtype, "xab")

    def check(got: dict[str, Tensor], label: str) -> object:
        return [
            assert_within_budget(
                t, oracle[n], low[n], f"{label}: {n}", FACTOR if n[0] == "z" else GRADIENT_FACTOR
            )
            for n, t in got.items()
        ]

    return check


def _work(i: LoraQkvInputs, provider: str) -> Work:
    n = i.linear
    named = {"x[0]": n.x}
    for key, ts in (("a", n.lora_as), ("b", n.lora_bs)):
        named |= {f"{key}[{g}]": t for g, t in enumerate(ts)}
    leaves = {name: t.detach().requires_grad_() for name, t in named.items()}
    shapes = [(*n.x.shape[:-1], w.shape[0] // i.head_dim, i.head_dim) for w in n.weights]
    upstream = {
        f"z[{g}]": dy.view(shape) for g, (dy, shape) in enumerate(zip(n.dys, shapes, strict=True))
    }

    def forward() -> dict[str, Tensor]:
        made = (_apart if provider == "apart" else _joined)(i, leaves, provider)
        return {f"z[{g}]": t for g, t in enumerate(made)}

    return Work(forward, leaves, upstream)


def _members(i: LoraQkvInputs, leaves: dict[str, Tensor]) -> tuple[Any, ...]:
    count = range(len(i.rotated))
    return (
        leaves["x[0]"], i.linear.weights, [leaves[f"a[{g}]"] for g in count],
        [leaves[f"b[{g}]"] for g in count], i.linear.scalings,
    )  # fmt: skip


def _joined(i: LoraQkvInputs, leaves: dict[str, Tensor], provider: str) -> list[Tensor]:
    t = i.tables
    return lora_qkv(
        *_members(i, leaves), t.cos, t.sin, head_dim=i.head_dim, rotated=i.rotated,
        biases=i.linear.biases, interleaved=t.interleaved, position_ids=t.position_ids,
        dropout_p=i.linear.dropout_p, seed=i.linear.seed, backend=provider,
    )  # fmt: skip


def _apart(i: LoraQkvInputs, leaves: dict[str, Tensor], provider: str) -> list[Tensor]:
    """grouped_lora_linear, then rope, each on what `auto` takes."""
    t = i.tables
    ys = grouped_lora_linear(*_members(i, leaves), biases=i.linear.biases)
    heads = [y.unflatten(-1, (-1, i.head_dim)) for y in ys]
    some = {"interleaved": t.interleaved, "position_ids": t.position_ids}
    if len(heads) == 1:
        first, rest = heads[0].tensor_split([i.rotated[0]], -2)
        return [torch.cat([rope(first, None, t.cos, t.sin, **some)[0], rest], -2)]
    q, k = rope(heads[0], heads[1], t.cos, t.sin, **some)
    assert k is not None
    return [q, k, heads[2]]


def _problem(i: LoraQkvInputs) -> Keywords:
    n, D = i.linear, i.head_dim
    heads = [w.shape[0] // D for w in n.weights]
    return {
        "M": n.x.shape[:-1].numel(), "K": n.x.shape[-1], "H": heads[0], "Hk": sum(heads[1:]) // 2,
        "D": D, "R": i.tables.cos.shape[-1], "rank": max(a.shape[0] for a in n.lora_as),
        "interleaved": i.tables.interleaved, "dtype": n.x.dtype, "dropout_p": n.dropout_p,
        "members": len(n.weights), "frozen": sum(len(a) == 0 for a in n.lora_as),
    }  # fmt: skip


LLAMA: dict[str, Any] = {
    "K": 4096, "H": 32, "Hk": 8, "D": 128, "rank": 16, "bias": False, "dtype": BF16,
}  # fmt: skip
ROW = GpuOp(
    name="lora_qkv",
    small=(
        {"lead": (2, 37), "K": 64, "H": 4, "Hk": 2, "D": 16, "dtype": BF16},
        {"lead": (1, 70), "K": 72, "H": 3, "Hk": 1, "D": 20, "R": 6, "dtype": torch.float16},
        {"lead": (33,), "K": 41, "H": 5, "Hk": 1, "D": 10, "interleaved": True, "tables": "cache"},
        {"lead": (2, 9), "K": 40, "H": 2, "Hk": 2, "D": 8, "joint": True, "tables": "batch"},
        {
            "lead": (2, 130), "K": 72, "H": 4, "Hk": 2, "D": 64, "joint": True, "tables": "cache",
            "interleaved": True, "dtype": BF16,
        },
    ),
    cases={
        "4×2048, Llama-3.1-8B bfloat16": {"lead": (4, 2048), **LLAMA},
        "64×1, Llama-3.1-8B bfloat16": {"lead": (64, 1), **LLAMA},
        "4×2048, Llama-3.1-8B, joint bfloat16": {"lead": (4, 2048), "joint": True, **LLAMA},
    },
    inputs=lora_qkv_inputs,
    judge=_judge,
    work=_work,
    problem=_problem,
    peers=("apart",),
)  # fmt: skip
