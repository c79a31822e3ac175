"""An MLP with adapters: S of down, dS and dB of gate and up, made in the activation or apart.

`aten` is the MLP with every op by itself, each on what `auto` takes; a backend's name means that
gated_activation runs on it and makes these products, with the layers on what `auto` takes. So
tables of the two ops come first. Forward and backward are judged apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_ops.row import FLOOR, GpuOp, Judge, Keywords, Work
from lora_kernels.modules.mlp_function import MlpFunction, Plan
from lora_kernels.ops._shrink_pairs import ACTIVATION, DIRECTIONS
from lora_kernels.testing import LoraLinearInputs, assert_within_budget, lora_linear_inputs
from lora_kernels.testing.gated_activation import formula

BF16, FP16 = torch.bfloat16, torch.float16
GRADIENT_FACTOR = 3.0


@dataclass(frozen=True)
class MlpInputs:
    """`first`: of gate and up, or of up alone; `down`, whose x is not used; dy `[M, K]`."""

    first: LoraLinearInputs
    down: LoraLinearInputs
    kind: str
    dy: Tensor


def inputs(
    M: int, K: int, N: int, rank: int = 16, kind: str = "silu", gated: bool = True,
    dtype: torch.dtype = torch.float32, adapter_dtype: torch.dtype | None = None,
) -> MlpInputs:  # fmt: skip
    """x [M, K], N columns between the layers."""
    common: dict[str, Any] = {"dtype": dtype, "adapter_dtype": adapter_dtype, "bias": False}
    first = lora_linear_inputs(M, K, (N, N) if gated else (N,), rank, **common)
    down = lora_linear_inputs(1, N, K, rank, generator_seed=1, **common)
    generator = torch.Generator().manual_seed(2)
    dy = torch.randn(M, K, generator=generator, dtype=torch.float64).to(dtype)
    return MlpInputs(first, down, kind, dy)


def _parts(i: MlpInputs) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]:
    """Weights, A, B and scalings of gate, up and down."""
    a, b = i.first, i.down
    return (
        [*a.weights, *b.weights], [*a.lora_as, *b.lora_as], [*a.lora_bs, *b.lora_bs],
        [*a.scalings, *b.scalings],
    )  # fmt: skip


def _leaves(i: MlpInputs, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    _, lora_as, lora_bs, _ = _parts(i)
    named = {"x": i.first.x}
    for key, ts in (("a", lora_as), ("b", lora_bs)):
        named |= {f"{key}[{g}]": t for g, t in enumerate(ts)}
    return {k: t.detach().to(dtype or t.dtype).requires_grad_() for k, t in named.items()}


def _results(i: MlpInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Plain PyTorch in `dtype`."""
    weights, _, _, scalings = _parts(i)
    leaves = _leaves(i, dtype)

    def layer(x: Tensor, g: int) -> Tensor:
        update = (x @ leaves[f"a[{g}]"].t()) @ leaves[f"b[{g}]"].t()
        return x @ weights[g].to(dtype).t() + scalings[g] * update

    last = len(weights) - 1
    up = layer(leaves["x"], 1) if last == 2 else None
    y = layer(formula(layer(leaves["x"], 0), up, i.kind), last)
    grads = torch.autograd.grad(y, list(leaves.values()), i.dy.to(dtype))
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def _judge(i: MlpInputs) -> Judge:
    oracle, low = _results(i, torch.float64), _results(i, i.first.x.dtype)

    def check(got: dict[str, Tensor], label: str) -> object:
        return [
            assert_within_budget(
                t, oracle[n], low[n], f"{label}: {n}", 2.0 if n == "y" else GRADIENT_FACTOR
            )
            for n, t in got.items()
        ]

    return check


def _work(i: MlpInputs, provider: str) -> Work:
    weights, _, _, scalings = _parts(i)
    leaves, count = _leaves(i), range(len(weights))
    maker = "" if provider == FLOOR else provider
    plan = Plan(i.kind, False, scalings, (0.0, 0.0), "auto", maker, maker)
    flat = [
        *weights, *(leaves[f"a[{g}]"] for g in count), *(leaves[f"b[{g}]"] for g in count),
        *(None for _ in count),
    ]  # fmt: skip

    def forward() -> dict[str, Tensor]:
        return {"y": MlpFunction.apply(leaves["x"], plan, None, None, None, *flat)}

    return Work(forward, leaves, {"y": i.dy})


def _problem(i: MlpInputs) -> Keywords:
    weights, lora_as, _, _ = _parts(i)
    return {
        "M": i.first.x.shape[0], "K": i.first.x.shape[1], "N": tuple(w.shape[0] for w in weights),
        "rank": tuple(a.shape[0] for a in lora_as), "dtype": i.first.x.dtype,
        "adapter_dtype": lora_as[0].dtype, "activation": i.kind,
    }  # fmt: skip


def _gate(keywords: Keywords) -> Keywords:
    """Fewer rows: the oracle is in fp64."""
    return {**keywords, "M": min(keywords["M"], 300)}


def _case(M: int, K: int, N: int, rank: int, kind: str = "silu") -> Keywords:
    return {"M": M, "K": K, "N": N, "rank": rank, "kind": kind, "dtype": BF16}


ROW = GpuOp(
    name=ACTIVATION,
    small=(
        {"M": 18, "K": 96, "N": 128, "rank": 8, "dtype": BF16},
        {"M": 37, "K": 40, "N": 33, "rank": 5, "kind": "gelu_tanh", "gated": False, "dtype": FP16},
        {"M": 130, "K": 64, "N": 520, "rank": 64, "dtype": BF16, "adapter_dtype": torch.float32},
    ),
    cases={
        "8192×4096×14336 silu r16 bfloat16": _case(8192, 4096, 14336, 16),
        "1024×4096×14336 silu r16 bfloat16": _case(1024, 4096, 14336, 16),
        "8192×2048×5632 silu r64 bfloat16": _case(8192, 2048, 5632, 64),
        "16×4096×14336 silu r16 bfloat16": _case(16, 4096, 14336, 16),
    },
    inputs=inputs,
    judge=_judge,
    work=_work,
    problem=_problem,
    gate=_gate,
    modes=DIRECTIONS[ACTIVATION],
)  # fmt: skip
