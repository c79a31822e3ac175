"""rms_norm: against the formula in PyTorch, its fused kernel, and Liger's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_ops.row import GpuOp, Judge, Keywords, Work
from benchmarks.peers import UnavailableError, load
from lora_kernels.ops import rms_norm
from lora_kernels.testing import RmsNormInputs, assert_within_budget, rms_norm_inputs
from lora_kernels.testing.rms_norm import formula, results

BF16, FP16 = torch.bfloat16, torch.float16


def _judge(i: RmsNormInputs) -> Judge:
    oracle, low = results(i, wide=True), results(i, wide=False)

    def check(got: dict[str, Tensor], label: str) -> object:
        return [assert_within_budget(t, oracle[n], low[n], f"{label}: {n}") for n, t in got.items()]

    return check


def _work(i: RmsNormInputs, provider: str) -> Work:
    """x and the weight are differentiated; s is a value."""
    named = {"x": i.x, "weight": i.weight}
    leaves = {n: t.detach().requires_grad_() for n, t in named.items() if t is not None}
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(i.x.shape, generator=generator, dtype=torch.float64).to(i.x)
    own = {"eager": _eager, "torch-fused": _fused, "liger": _liger}
    run = own.get(provider)
    if provider == "eager-compile":
        run = torch.compile(_eager)
    if provider in ("torch-fused", "liger") and i.weight is None:
        raise UnavailableError("called here with a weight alone")
    if provider == "torch-fused" and i.offset != 0.0:
        raise UnavailableError("torch's kernel has no offset")
    if provider == "liger":
        load(*_LIGER)

    def forward() -> dict[str, Tensor]:
        if run is not None:
            y, s = run(i, leaves)
        else:
            made = rms_norm(
                leaves["x"], leaves.get("weight"), i.eps, i.offset, lora_as=i.lora_as,
                backend=provider,
            )  # fmt: skip
            y, s = made if isinstance(made, tuple) else (made, None)
        return {"y": y} if s is None or s.numel() == 0 else {"y": y, "s": s}

    return Work(forward, leaves, {"y": dy})


_LIGER = ("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")


def _eager(i: RmsNormInputs, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """As transformers has it."""
    return formula(i, leaves["x"], leaves.get("weight"))


def _products(i: RmsNormInputs, y: Tensor) -> Tensor | None:
    if not i.lora_as:
        return None
    return y.detach() @ torch.cat([a.to(y.dtype) for a in i.lora_as]).t()


def _fused(i: RmsNormInputs, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    x, weight = leaves["x"], leaves["weight"]
    y = torch.nn.functional.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), i.eps)
    return y, _products(i, y)


def _liger(i: RmsNormInputs, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Computed in fp32 and rounded once ("gemma"), its dx not written over dy."""
    y = load(*_LIGER).apply(leaves["x"], leaves["weight"], i.eps, i.offset, "gemma", False)
    return y, _products(i, y)


def _problem(i: RmsNormInputs) -> Keywords:
    return {
        "M": i.x.numel() // i.x.shape[-1], "K": i.x.shape[-1],
        "R": sum(a.shape[0] for a in i.lora_as), "dtype": i.x.dtype,
        "weight_dtype": None if i.weight is None else i.weight.dtype,
    }  # fmt: skip


def _gate(keywords: Keywords) -> Keywords:
    """Fewer rows: the oracle is in fp64."""
    return {**keywords, "shape": (min(keywords["shape"][0], 300), keywords["shape"][1])}


def _case(M: int, K: int, *ranks: int, **options: Any) -> Keywords:
    return {"shape": (M, K), "ranks": ranks, "dtype": BF16, **options}


ROW = GpuOp(
    name="rms_norm",
    small=(
        {"shape": (2, 9, 96), "ranks": (8, 5), "dtype": BF16},
        {"shape": (37, 40), "dtype": FP16, "offset": 1.0, "weight_dtype": torch.float32},
        {"shape": (70, 33), "ranks": (3,), "layout": "strided", "adapter_dtype": torch.float32},
        {"shape": (5, 9000), "ranks": (16, 16, 16), "dtype": BF16, "weighted": False},
        {"shape": (300, 1024), "ranks": (100, 64), "dtype": FP16, "layout": "misaligned"},
    ),
    cases={
        "8192×4096 r16+16+16 bfloat16": _case(8192, 4096, 16, 16, 16),
        "8192×4096 r16+16 bfloat16": _case(8192, 4096, 16, 16),
        "8192×4096 bfloat16": _case(8192, 4096),
        "16×4096 r16+16+16 bfloat16": _case(16, 4096, 16, 16, 16),
        "8192×1024 r16+16+16 bfloat16": _case(8192, 1024, 16, 16, 16),
        "8192×8192 r64+64+64 bfloat16": _case(8192, 8192, 64, 64, 64),
    },
    inputs=rms_norm_inputs,
    judge=_judge,
    work=_work,
    problem=_problem,
    peers=("eager", "eager-compile", "torch-fused", "liger"),
    gate=_gate,
)  # fmt: skip
