"""Results of lora_linear by its plain formula under autograd, in a dtype of choice.

In fp64 this is the oracle, in the compute dtype what plain PyTorch gives. The gradients
come from autograd, so they also check the hand-derived ones of reference.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops._philox import keep_mask, keep_scale
from lora_kernels.testing.inputs import LoraLinearInputs


@dataclass(frozen=True)
class LoraLinearResults:
    """Outputs and every gradient; lists have one entry per group member."""

    ys: list[Tensor]
    dx: Tensor
    dws: list[Tensor]
    das: list[Tensor]
    dbs: list[Tensor]
    dbiases: list[Tensor | None]

    def named(self) -> dict[str, Tensor]:
        """Flat view, ``{"dx": ..., "y[0]": ..., "da[0]": ...}``."""
        flat = {"dx": self.dx}
        for stem, tensors in (
            ("y", self.ys), ("dw", self.dws), ("da", self.das), ("db", self.dbs),
            ("dbias", self.dbiases),
        ):  # fmt: skip
            flat |= {f"{stem}[{g}]": t for g, t in enumerate(tensors) if t is not None}
        return flat


def _mm_nt(a: Tensor, b: Tensor, reverse: bool) -> Tensor:
    """a b^T; reversed in all three axes so that its gradients are summed in reverse as well."""
    return (a.flip(0, 1) @ b.flip(0, 1).t()).flip(0, 1) if reverse else a @ b.t()


def lora_linear_results(
    inputs: LoraLinearInputs, dtype: torch.dtype, *, needs: str = "xwabc", reverse: bool = False
) -> LoraLinearResults:
    """Every operand converted to `dtype`, then the formula and its gradients.

    `needs` names the operands to differentiate, as in :func:`lora_kernels.testing.lora_linear_op`;
    `reverse` takes every sum in reverse order and scales B instead of the update.
    """
    i = inputs
    rows = i.x.shape[:-1].numel()

    def leaf(t: Tensor, key: str) -> Tensor:
        return t.detach().to(dtype).clone().requires_grad_(key in needs)

    x = leaf(i.x, "x")
    ws = [leaf(t, "w") for t in i.weights]
    las = [leaf(t, "a") for t in i.lora_as]
    lbs = [leaf(t, "b") for t in i.lora_bs]
    biases = [None if b is None else leaf(b, "c") for b in i.biases]
    flat = x.reshape(rows, x.shape[-1])
    ys = []
    for g, (w, a, b, bias) in enumerate(zip(ws, las, lbs, biases, strict=True)):
        dropped = flat
        if i.dropout_p > 0.0:
            seed = torch.tensor(i.seed, device=x.device)
            mask = keep_mask(seed, rows, x.shape[-1], i.dropout_p, g)
            dropped = flat * mask.to(dtype) * keep_scale(i.dropout_p)
        if reverse:
            update = _mm_nt(_mm_nt(dropped, a, True), i.scalings[g] * b, True)
        else:
            update = i.scalings[g] * _mm_nt(_mm_nt(dropped, a, False), b, False)
        y = _mm_nt(flat, w, reverse) + update
        y = y if bias is None else y + bias
        ys.append(y.view(*i.x.shape[:-1], w.shape[0]))
    if needs:
        torch.autograd.backward(ys, [dy.to(dtype) for dy in i.dys])

    def grads(ts: list[Tensor]) -> list[Tensor]:
        return [t.grad for t in ts if t.grad is not None]

    return LoraLinearResults(
        ys=[y.detach() for y in ys],
        dx=i.x.new_empty(0) if x.grad is None else x.grad,
        dws=grads(ws),
        das=grads(las),
        dbs=grads(lbs),
        dbiases=[None if b is None else b.grad for b in biases],
    )


def yardstick(
    inputs: LoraLinearInputs, oracle: LoraLinearResults, needs: str = "xwabc"
) -> LoraLinearResults:
    """What plain PyTorch gives in the dtype of x: the `low_precision` of the budget.

    Neither order of summation is the right one, so each element is the worse of two: the plain
    formula and :func:`lora_linear_results` with `reverse`. With one row or rank 1 a single
    lucky rounding would otherwise leave next to no budget.
    """
    dtype = inputs.x.dtype
    plain, reverse = (
        lora_linear_results(inputs, dtype, needs=needs, reverse=r) for r in (False, True)
    )

    def worse(first: Tensor, second: Tensor, exact: Tensor) -> Tensor:
        farther = (first.double() - exact).abs() >= (second.double() - exact).abs()
        return torch.where(farther, first, second)

    def worse_of(key: str) -> list[Any]:
        triples = zip(*(getattr(r, key) for r in (plain, reverse, oracle)), strict=True)
        return [None if a is None else worse(a, b, exact) for a, b, exact in triples]

    return LoraLinearResults(
        dx=worse(plain.dx, reverse.dx, oracle.dx),
        **{key: worse_of(key) for key in ("ys", "dws", "das", "dbs", "dbiases")},
    )
