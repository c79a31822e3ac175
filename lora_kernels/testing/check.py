"""Run lora_linear on given inputs and hold every output and gradient to the budget."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops.lora_linear.api import grouped_lora_linear
from lora_kernels.testing.budget import Margin, assert_within_budget
from lora_kernels.testing.inputs import LoraLinearInputs
from lora_kernels.testing.oracle import LoraLinearResults, lora_linear_results, yardstick


def lora_linear_op(
    inputs: LoraLinearInputs, backend: str | None, needs: str = "xwabc"
) -> LoraLinearResults:
    """Forward and backward of the op on one backend.

    Args:
        needs: which operands require a gradient, out of x, w(eights), a, b and c (biases). What
            is left out has no entry in the result (dx is then empty).
    """
    i = inputs

    def leaf(t: Tensor, key: str) -> Tensor:
        return t.detach().requires_grad_(key in needs)  # keeps strides and offset

    x = leaf(i.x, "x")
    ws, las, lbs = (
        [leaf(t, key) for t in ts]
        for ts, key in ((i.weights, "w"), (i.lora_as, "a"), (i.lora_bs, "b"))
    )
    biases = [None if b is None else leaf(b, "c") for b in i.biases]
    ys = grouped_lora_linear(
        x, ws, las, lbs, i.scalings,
        biases=biases, dropout_p=i.dropout_p, seed=i.seed, backend=backend,
    )  # fmt: skip
    if any(y.requires_grad for y in ys):
        torch.autograd.backward(ys, [dy.to(y.dtype) for dy, y in zip(i.dys, ys, strict=True)])

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


def compare(
    actual: LoraLinearResults, oracle: LoraLinearResults, low: LoraLinearResults, label: str = ""
) -> dict[str, Margin]:
    """Budget check of everything that `actual` holds; the margins by name."""
    want, yard = oracle.named(), low.named()
    return {
        name: assert_within_budget(t, want[name], yard[name], f"{label}{name}")
        for name, t in actual.named().items()
        if not (name == "dx" and t.dim() == 1 and t.numel() == 0)
    }


def check_lora_linear(
    inputs: LoraLinearInputs, backend: str | None, needs: str = "xwabc"
) -> dict[str, Margin]:
    """The op against oracle and yardstick; raises BudgetExceededError, returns the margins."""
    oracle = lora_linear_results(inputs, torch.float64, needs=needs)
    actual = lora_linear_op(inputs, backend, needs)
    return compare(actual, oracle, yardstick(inputs, oracle, needs), f"{backend}: ")
