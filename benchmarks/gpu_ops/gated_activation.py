"""gated_activation: against the two operations in PyTorch, and Liger's kernel.

With adapters the backward is that of the registered pair: dS and dB of the layers before leave with
the gradients of gate and up. What PyTorch's peer does then is the same products, each a pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_ops.row import GpuOp, Judge, Keywords, Work
from benchmarks.peers import UnavailableError, load
from lora_kernels.ops import gated_activation
from lora_kernels.testing import (
    GatedActivationInputs,
    assert_within_budget,
    gated_activation_inputs,
)
from lora_kernels.testing.gated_activation import formula

BF16, FP16 = torch.bfloat16, torch.float16


def _leaves(i: GatedActivationInputs, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The operands, and with adapters S (whose gradient is dS) and the Bs; two-dimensional."""
    named = {"gate": i.gate.flatten(0, -2)}
    if i.up is not None:
        named["up"] = i.up.flatten(0, -2)
    if i.s is not None:
        named |= {"s": i.s, **{f"b{g}": b for g, b in enumerate(i.lora_bs)}}
    return {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in named.items()}


def _upstream(i: GatedActivationInputs) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = i.gate.flatten(0, -2).shape
    dh = torch.randn(shape, generator=generator, dtype=torch.float64)
    return dh.to(i.gate.device, i.gate.dtype)


class _Eager(torch.autograd.Function):
    """h and h A^T of gate and up, which are taken to hold c S B^T already."""

    @staticmethod
    def forward(
        ctx: Any, i: GatedActivationInputs, gate: Tensor, up: Tensor | None, s: Tensor | None,
        *bs: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (gate, up) if t is not None]
            h = formula(leaves[0], leaves[1] if up is not None else None, i.kind)
        ctx.i, ctx.leaves, ctx.h = i, leaves, h
        ctx.save_for_backward(s, *bs)
        return h.detach(), _shrink(i, h.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        s, *bs = ctx.saved_tensors
        made = torch.autograd.grad(ctx.h, ctx.leaves, grads[0], retain_graph=True)
        dup = made[1] if len(made) == 2 else None
        if s is None:
            return None, made[0], dup, None
        parts = s.split([b.shape[1] for b in bs], 1)
        terms = zip(made, bs, ctx.i.scalings, strict=True)
        found = [(c * (d @ b.to(d.dtype)), c * d.t(), b.dtype) for d, b, c in terms]
        dbs = [(d @ part).to(dtype) for (_, d, dtype), part in zip(found, parts, strict=True)]
        return None, made[0], dup, torch.cat([ds for ds, _, _ in found], 1), *dbs


class _Pair(torch.autograd.Function):
    """The registered pair of a backend, with everything it can make on the way."""

    @staticmethod
    def forward(
        ctx: Any, i: GatedActivationInputs, backend: str, gate: Tensor, up: Tensor | None,
        s: Tensor | None, *bs: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.i, ctx.backend = i, backend
        ctx.save_for_backward(gate, up, s, *bs)
        return torch.ops.lora_kernels.gated_activation_fwd(gate, up, i.kind, i.lora_as, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, s, *bs = ctx.saved_tensors
        dgate, dup, ds, dbs = torch.ops.lora_kernels.gated_activation_bwd(
            grads[0], gate, up, ctx.i.kind, bs, s, ctx.i.scalings, ctx.backend
        )
        rest = () if s is None else (ds, *dbs)
        return None, None, dgate, None if up is None else dup, *(rest or (None,))


def _shrink(i: GatedActivationInputs, h: Tensor) -> Tensor:
    if not i.lora_as:
        return h.new_empty(h.shape[0], 0)
    return h @ torch.cat([a.to(h.dtype) for a in i.lora_as]).t()


def _results(i: GatedActivationInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Plain PyTorch in `dtype`; the products of adapters are of values rounded to it."""
    leaves = _leaves(i, dtype)
    bs = [leaves[n] for n in leaves if n.startswith("b")]
    h, s = _Eager.apply(i, leaves["gate"], leaves.get("up"), leaves.get("s"), *bs)
    grads = torch.autograd.grad(h, list(leaves.values()), _upstream(i).to(dtype))
    named = {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}
    return {"h": h.detach(), **({"s": s} if s.numel() else {}), **named}


def _judge(i: GatedActivationInputs) -> Judge:
    oracle, low = _results(i, torch.float64), _results(i, i.gate.dtype)

    def check(got: dict[str, Tensor], label: str) -> object:
        return [assert_within_budget(t, oracle[n], low[n], f"{label}: {n}") for n, t in got.items()]

    return check


_LIGER = ("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")


def _work(i: GatedActivationInputs, provider: str) -> Work:
    leaves = _leaves(i)
    adapted = i.s is not None or bool(i.lora_as)
    gate, up, s = leaves["gate"], leaves.get("up"), leaves.get("s")
    bs = [leaves[n] for n in leaves if n.startswith("b")]
    if adapted and provider in ("eager-compile", "liger"):
        raise UnavailableError(f"{provider} makes no S, dS or dB")
    if provider == "liger":
        if i.kind != "silu" or up is None:
            raise UnavailableError("liger is called here for SwiGLU")
        load(*_LIGER)
    compiled = torch.compile(formula) if provider == "eager-compile" else formula

    def forward() -> dict[str, Tensor]:
        if provider == "liger":
            return {"h": load(*_LIGER).apply(gate, up)}
        if not adapted:
            if provider in ("eager", "eager-compile"):
                return {"h": compiled(gate, up, i.kind)}
            return {"h": gated_activation(gate, up, i.kind, backend=provider)}
        if provider == "eager":
            h, made = _Eager.apply(i, gate, up, s, *bs)
        else:
            h, made = _Pair.apply(i, provider, gate, up, s, *bs)
        return {"h": h, "s": made} if i.lora_as else {"h": h}

    return Work(forward, leaves, {"h": _upstream(i)})


def _problem(i: GatedActivationInputs) -> Keywords:
    """Forward and backward in one: the ranks of both."""
    adapters = [*i.lora_as, *i.lora_bs]
    return {
        "M": i.gate.numel() // i.gate.shape[-1], "N": i.gate.shape[-1], "kind": i.kind,
        "gated": i.up is not None, "dtype": i.gate.dtype,
        "rank": sum(a.shape[0] for a in i.lora_as),
        "member_ranks": tuple(b.shape[1] for b in i.lora_bs), "with_db": i.s is not None,
        "adapter_dtype": adapters[0].dtype if adapters else None,
    }  # fmt: skip


def _gate(keywords: Keywords) -> Keywords:
    """Fewer rows: the oracle is in fp64."""
    return {**keywords, "shape": (min(keywords["shape"][0], 300), keywords["shape"][1])}


def _case(M: int, N: int, kind: str, rank: int) -> Keywords:
    ranks: Keywords = {"ranks": (rank,), "member_ranks": (rank, rank)} if rank else {}
    return {"shape": (M, N), "kind": kind, "dtype": BF16, **ranks}


ROW = GpuOp(
    name="gated_activation",
    small=(
        {"shape": (2, 9, 96), "ranks": (5,), "member_ranks": (8, 3), "dtype": BF16},
        {"shape": (37, 40), "kind": "gelu_tanh", "dtype": FP16, "layout": "strided"},
        {"shape": (70, 33), "kind": "gelu", "gated": False, "ranks": (3, 16), "member_ranks": (4,)},
        {"shape": (130, 1100), "ranks": (64, 100), "member_ranks": (64, 64), "dtype": FP16},
        {"shape": (300, 520), "kind": "relu_squared", "ranks": (16,), "member_ranks": (16, 16),
         "dtype": BF16, "adapter_dtype": torch.float32},
    ),
    cases={
        "8192×14336 silu r16 bfloat16": _case(8192, 14336, "silu", 16),
        "8192×14336 silu bfloat16": _case(8192, 14336, "silu", 0),
        "8192×14336 gelu_tanh r16 bfloat16": _case(8192, 14336, "gelu_tanh", 16),
        "16×14336 silu r16 bfloat16": _case(16, 14336, "silu", 16),
        "8192×5632 silu r64 bfloat16": _case(8192, 5632, "silu", 64),
    },
    inputs=gated_activation_inputs,
    judge=_judge,
    work=_work,
    problem=_problem,
    peers=("eager", "eager-compile", "liger"),
    gate=_gate,
)  # fmt: skip
