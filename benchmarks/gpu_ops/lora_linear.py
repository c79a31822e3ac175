"""lora_linear: against the frozen layer, PEFT and other projects' kernels (benchmarks/gpu.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.gpu_ops.row import GpuOp, Judge, Keywords, Run, Work
from benchmarks.providers import Case
from lora_kernels.ops import grouped_lora_linear
from lora_kernels.testing import (
    LoraLinearInputs,
    compare,
    lora_linear_inputs,
    lora_linear_results,
    yardstick,
)
from lora_kernels.testing.oracle import LoraLinearResults

BF16, FP16 = torch.bfloat16, torch.float16
# M, K, N, rank, dropout: every edge once, groups, ranks off the tile.
SMALL = (
    (65, 96, (80,), 8, 0.0),
    (130, 264, (136, 72), 16, 0.25),
    (33, 70, (45,), 5, 0.0),
    (1, 128, (256,), 64, 0.1),
)


def _judge(i: LoraLinearInputs) -> Judge:
    oracle = lora_linear_results(i, torch.float64, needs="xab")
    low = yardstick(i, oracle, "xab")
    n = len(i.weights)

    def check(got: dict[str, Tensor], label: str) -> object:
        def of(name: str) -> list[Tensor]:
            return [got[f"{name}{g}"] for g in range(n)]

        made = LoraLinearResults(
            ys=of("y"), dx=got["dx"], dws=[], das=of("da"), dbs=of("db"), dbiases=[None] * n
        )
        return compare(made, oracle, low, f"{label}: ")

    return check


def _work(i: LoraLinearInputs, provider: str) -> Work:
    leaves = {"x": i.x, **{f"a{g}": a for g, a in enumerate(i.lora_as)}}
    leaves |= {f"b{g}": b for g, b in enumerate(i.lora_bs)}
    leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
    n = len(i.weights)

    def forward() -> dict[str, Tensor]:
        ys = grouped_lora_linear(
            leaves["x"], i.weights, [leaves[f"a{g}"] for g in range(n)],
            [leaves[f"b{g}"] for g in range(n)], i.scalings, biases=i.biases,
            dropout_p=i.dropout_p, seed=i.seed, backend=provider,
        )  # fmt: skip
        return {f"y{g}": y for g, y in enumerate(ys)}

    return Work(forward, leaves, {f"y{g}": dy for g, dy in enumerate(i.dys)})


def _problem(i: LoraLinearInputs) -> Keywords:
    return {
        "M": i.x.shape[0], "K": i.x.shape[1], "N": tuple(w.shape[0] for w in i.weights),
        "rank": tuple(a.shape[0] for a in i.lora_as), "dtype": i.x.dtype,
        "adapter_dtype": i.lora_as[0].dtype, "dropout_p": i.dropout_p,
    }  # fmt: skip


@dataclass(frozen=True)
class LoraLinearOp(GpuOp):
    """The cases are those of benchmarks/gpu.py, whose providers need more than one row can say."""

    def providers(self) -> tuple[str, ...]:
        return gpu.DEFAULT

    def count(self) -> int:
        return len(gpu.CASES)

    def bench(self, number: int, names: tuple[str, ...], run: Run) -> Iterator[dict[str, Any]]:
        case = gpu.CASES[number]
        here = [n for n in names if n != "peft-compile" or number < gpu.COMPILED_CASES]

        def announce(name: str, told: Case) -> None:
            run.announce(gpu.row(told, "fwd", name, None, None, {}, {}) if name else None)

        yield from gpu.run_case(
            case, here, run.modes, run.top, run.timed, run.rounds, run.count, announce
        )


ROW = LoraLinearOp(
    name="lora_linear",
    small=tuple(
        {"M": m, "K": k, "N": n, "rank": rank, "dtype": dtype, "dropout_p": p}
        for m, k, n, rank, p in SMALL
        for dtype in (BF16, FP16)
    ),
    cases={gpu.label(case): {} for case in gpu.CASES},
    inputs=lora_linear_inputs,
    judge=_judge,
    work=_work,
    problem=_problem,
)
