"""rms_norm, then grouped_lora_linear: S made by the norm against each op by itself.

`aten` is the pair apart, each op on what `auto` takes; a backend's name means that the norm runs on
it and hands S on, with the layers on what `auto` takes. So tables of the two ops come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_ops.row import FLOOR, GpuOp, Judge, Keywords, Work
from lora_kernels.ops import grouped_lora_linear, rms_norm
from lora_kernels.ops._shrink_pairs import DIRECTIONS, NORM
from lora_kernels.testing import LoraLinearInputs, assert_within_budget, lora_linear_inputs

BF16, FP16 = torch.bfloat16, torch.float16
EPS = 1e-5
GRADIENT_FACTOR = 3.0


@dataclass(frozen=True)
class NormShrinkInputs:
    """`linear`: of the layers, whose x is that of the norm; weight `[K]` of the norm."""

    linear: LoraLinearInputs
    weight: Tensor


def inputs(**keywords: Any) -> NormShrinkInputs:
    made = lora_linear_inputs(**keywords)
    generator = torch.Generator().manual_seed(7)
    weight = 1.0 + 0.2 * torch.randn(made.x.shape[-1], generator=generator, dtype=torch.float64)
    return NormShrinkInputs(made, weight.to(made.x.dtype))


def _leaves(i: NormShrinkInputs, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    n = i.linear
    named = {"x": n.x}
    for key, ts in (("a", n.lora_as), ("b", n.lora_bs)):
        named |= {f"{key}[{g}]": t for g, t in enumerate(ts)}
    return {k: t.detach().to(dtype or t.dtype).requires_grad_() for k, t in named.items()}


def _adapters(i: NormShrinkInputs, leaves: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    count = range(len(i.linear.weights))
    return [leaves[f"a[{g}]"] for g in count], [leaves[f"b[{g}]"] for g in count]


def _results(i: NormShrinkInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Plain PyTorch in `dtype`."""
    n, leaves = i.linear, _leaves(i, dtype)
    y = torch.nn.functional.rms_norm(
        leaves["x"], (n.x.shape[-1],), i.weight.to(dtype), EPS
    )  # fmt: skip
    made = {}
    for g, (a, b) in enumerate(zip(*_adapters(i, leaves), strict=True)):
        z = y @ n.weights[g].to(dtype).t() + n.scalings[g] * ((y @ a.t()) @ b.t())
        bias = n.biases[g]
        made[f"y[{g}]"] = z if bias is None else z + bias.to(dtype)
    upstream = [dy.to(dtype) for dy in n.dys]
    grads = torch.autograd.grad(list(made.values()), list(leaves.values()), upstream)
    named = {f"d{k}": t for k, t in zip(leaves, grads, strict=True)}
    return {**{k: t.detach() for k, t in made.items()}, **named}


def _judge(i: NormShrinkInputs) -> Judge:
    oracle, low = _results(i, torch.float64), _results(i, i.linear.x.dtype)

    def check(got: dict[str, Tensor], label: str) -> object:
        return [
            assert_within_budget(
                t, oracle[n], low[n], f"{label}: {n}", 2.0 if n[0] == "y" else GRADIENT_FACTOR
            )
            for n, t in got.items()
        ]

    return check


def _work(i: NormShrinkInputs, provider: str) -> Work:
    n, leaves = i.linear, _leaves(i)
    lora_as, lora_bs = _adapters(i, leaves)
    values = [a.detach() for a in lora_as]

    def forward() -> dict[str, Tensor]:
        s: Tensor | None = None
        if provider == FLOOR:
            y = rms_norm(leaves["x"], i.weight, EPS)
        else:
            y, s = rms_norm(leaves["x"], i.weight, EPS, lora_as=values, backend=provider)
        assert isinstance(y, Tensor)
        ys = grouped_lora_linear(
            y, n.weights, lora_as, lora_bs, n.scalings, biases=n.biases, shrunk=s
        )
        return {f"y[{g}]": t for g, t in enumerate(ys)}

    return Work(forward, leaves, {f"y[{g}]": dy for g, dy in enumerate(n.dys)})


def _problem(i: NormShrinkInputs) -> Keywords:
    n = i.linear
    return {
        "M": n.x.shape[:-1].numel(), "K": n.x.shape[-1],
        "N": tuple(w.shape[0] for w in n.weights), "rank": tuple(a.shape[0] for a in n.lora_as),
        "dtype": n.x.dtype, "adapter_dtype": n.lora_as[0].dtype,
    }  # fmt: skip


def _gate(keywords: Keywords) -> Keywords:
    """Fewer rows: the oracle is in fp64."""
    M = keywords["M"]
    return {**keywords, "M": min(M, 300) if isinstance(M, int) else M}


def _case(M: int, K: int, *N: int, rank: int = 16) -> Keywords:
    return {"M": M, "K": K, "N": N, "rank": rank, "bias": False, "dtype": BF16}


ROW = GpuOp(
    name=NORM,
    small=(
        {"M": (2, 9), "K": 96, "N": (64, 32, 32), "rank": (8, 5, 3), "dtype": BF16},
        {"M": 37, "K": 40, "N": (33,), "rank": 16, "dtype": FP16},
        {"M": 130, "K": 520, "N": (96, 96), "rank": 64, "dtype": BF16,
         "adapter_dtype": torch.float32},
    ),
    cases={
        "8192×4096, q/k/v r16 bfloat16": _case(8192, 4096, 4096, 1024, 1024),
        "8192×4096, gate/up r16 bfloat16": _case(8192, 4096, 14336, 14336),
        "1024×4096, q/k/v r16 bfloat16": _case(1024, 4096, 4096, 1024, 1024),
        "16×4096, q/k/v r16 bfloat16": _case(16, 4096, 4096, 1024, 1024),
        "8192×4096, q/k/v r64 bfloat16": _case(8192, 4096, 4096, 1024, 1024, rank=64),
        "8192×2048, q/k/v r16 bfloat16": _case(8192, 2048, 2048, 512, 512),
    },
    inputs=inputs,
    judge=_judge,
    work=_work,
    problem=_problem,
    gate=_gate,
    modes=DIRECTIONS[NORM],
)  # fmt: skip
