"""linear_cross_entropy: against the logits and torch's loss, Liger's and Apple's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_ops.row import GpuOp, Judge, Keywords, Work
from benchmarks.peers import UnavailableError, load
from lora_kernels.ops import linear_cross_entropy
from lora_kernels.testing import (
    LinearCrossEntropyInputs,
    assert_within_budget,
    linear_cross_entropy_inputs,
)
from lora_kernels.testing.linear_cross_entropy import IGNORED, formula, results, yardstick

BF16, FP16 = torch.bfloat16, torch.float16


def _judge(i: LinearCrossEntropyInputs) -> Judge:
    oracle = results(i, torch.float64)
    low = yardstick(i, oracle)

    def check(got: dict[str, Tensor], label: str) -> object:
        return [assert_within_budget(t, oracle[n], low[n], f"{label}: {n}") for n, t in got.items()]

    return check


def _work(i: LinearCrossEntropyInputs, provider: str) -> Work:
    """The head is frozen, as it mostly is; hidden states and the adapter have gradients."""
    frozen = ("weight", "bias")
    named = {n: t.detach().requires_grad_(n not in frozen) for n, t in i.tensors().items()}
    leaves = {n: t for n, t in named.items() if n not in frozen}
    wide = torch.float64 if i.hidden.dtype == torch.float64 else torch.float32
    shape = i.labels.shape if i.options.get("reduction") == "none" else ()
    generator = torch.Generator().manual_seed(1)
    upstream = torch.rand(shape, generator=generator, dtype=torch.float64)
    upstream = upstream.to(i.hidden.device, wide)
    rest: dict[str, Any] = {n: t for n, t in named.items() if n not in ("hidden", "weight")}
    peers = {"eager": formula, "eager-compile": formula, "liger": _liger, "cce": _cut}
    if provider == "eager-compile":
        peers[provider] = torch.compile(formula)
    if provider in ("liger", "cce"):
        _plain(i, provider)
        load(*_PLACES[provider])

    def forward() -> dict[str, Tensor]:
        if provider in peers:
            return {"loss": peers[provider](i, named)}
        return {
            "loss": linear_cross_entropy(
                named["hidden"], named["weight"], i.labels,
                token_weights=i.token_weights, backend=provider, **rest, **i.options,
            )
        }  # fmt: skip

    return Work(forward, leaves, {"loss": upstream})


_PLACES = {
    "liger": (
        "liger_kernel.ops.fused_linear_cross_entropy",
        "LigerFusedLinearCrossEntropyFunction",
    ),
    "cce": ("cut_cross_entropy", "linear_cross_entropy"),
}


def _plain(i: LinearCrossEntropyInputs, name: str) -> None:
    if i.lora_a is not None or i.bias is not None or i.token_weights is not None:
        raise UnavailableError(f"{name} ignores an adapter on the head; timed without one")
    if set(i.options) - {"scaling", "ignore_index"}:
        raise UnavailableError(f"{name} is called here for a plain mean")


def _liger(i: LinearCrossEntropyInputs, named: dict[str, Tensor]) -> Tensor:
    apply = load(*_PLACES["liger"]).apply
    made = apply(named["hidden"].flatten(0, -2), named["weight"], i.labels.flatten())
    return made[0] if isinstance(made, tuple) else made


def _cut(i: LinearCrossEntropyInputs, named: dict[str, Tensor]) -> Tensor:
    run = load(*_PLACES["cce"])
    return run(named["hidden"], named["weight"], i.labels, ignore_index=IGNORED)


def _problem(i: LinearCrossEntropyInputs) -> Keywords:
    return {
        "M": i.labels.numel(), "K": i.hidden.shape[-1], "V": i.weight.shape[0],
        "rank": 0 if i.lora_a is None else i.lora_a.shape[0], "dtype": i.hidden.dtype,
    }  # fmt: skip


def _gate(keywords: Keywords) -> Keywords:
    """Fewer tokens and words: the oracle keeps every logit in fp64."""
    return {**keywords, "lead": (1, 300), "V": min(keywords["V"], 16000)}


def _case(lead: tuple[int, int], K: int, V: int, rank: int, **options: Any) -> Keywords:
    return {"lead": lead, "K": K, "V": V, "rank": rank, "dtype": BF16, "bias": False, **options}


ROW = GpuOp(
    name="linear_cross_entropy",
    small=(
        {"lead": (2, 9), "K": 24, "V": 67, "rank": 3, "dtype": BF16},
        {"lead": (33,), "K": 40, "V": 1030, "rank": 0, "dtype": FP16, "softcap": 5.0,
         "label_smoothing": 0.1},
        {"lead": (1, 17), "K": 16, "V": 130, "rank": 8, "z_loss": 0.01, "reduction": "none",
         "weighted": True},
        {"lead": (3, 5), "K": 16, "V": 5, "rank": 2, "dtype": BF16, "shift": True, "bias": False},
    ),
    cases={
        "8192 tokens, 4096×128256 bfloat16": _case((4, 2048), 4096, 128256, 0),
        "8192 tokens, 4096×128256 r16 bfloat16": _case((4, 2048), 4096, 128256, 16),
        "4096 tokens, 2304×256000 softcap r16 bfloat16": _case(
            (2, 2048), 2304, 256000, 16, softcap=30.0
        ),
        "4096 tokens, 576×49152 r16 bfloat16": _case((4, 1024), 576, 49152, 16),
    },
    inputs=linear_cross_entropy_inputs,
    judge=_judge,
    work=_work,
    problem=_problem,
    peers=("eager", "eager-compile", "liger", "cce"),
    gate=_gate,
    modes=("fwd", "fwdbwd"),  # the forward of a mean makes the gradients; its backward is a factor
)  # fmt: skip
