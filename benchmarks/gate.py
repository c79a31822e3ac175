"""Correctness before speed: a provider that misses the error budget is not timed."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.providers import BASELINE, Case, Provider, undropped
from lora_kernels.testing import (
    LoraLinearInputs,
    LoraLinearResults,
    Margin,
    compare,
    lora_linear_results,
    yardstick,
)


class Gate:
    """Oracle and yardstick of one case, computed once per adapter dtype and dropout."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[LoraLinearResults, LoraLinearResults]] = {}

    def _expected(self, i: LoraLinearInputs, frozen: bool) -> tuple:
        key = (i.lora_as[0].dtype, i.dropout_p, frozen)
        if key not in self._known:
            if frozen:
                i = replace(i, scalings=[0.0])
            needs = "x" if frozen else "xab"
            oracle = lora_linear_results(i, torch.float64, needs=needs)
            self._known[key] = oracle, yardstick(i, oracle, needs)
        return self._known[key]

    def check(self, provider: Provider, case: Case) -> Margin:
        """The worst margin over Y, dX, dA and dB.

        Raises:
            BudgetExceededError: with the figures.
        """
        judged = undropped(provider, case)
        i = judged.inputs
        if provider.name != BASELINE and case.dropout_p and judged is provider:
            judged = _with_seed(provider, case)
        y, grads = judged.fwd().detach(), judged.fwdbwd()
        actual = LoraLinearResults([y], grads[0], [], list(grads[1:2]), list(grads[2:3]), [None])
        expected = self._expected(i, provider.name == BASELINE)
        margins = compare(actual, *expected, f"{provider.name}: ").values()
        return Margin(max(m.max_norm for m in margins), max(m.rms for m in margins))


def _with_seed(provider: Provider, case: Case) -> Provider:
    """The same provider with the mask that the oracle draws."""
    from lora_kernels.ops import lora_linear

    i = provider.inputs
    x, a, b = provider.leaves

    def layer(t: torch.Tensor) -> torch.Tensor:
        return lora_linear(
            t, i.weights[0], a, b, i.scalings[0],
            dropout_p=case.dropout_p, seed=i.seed, backend=provider.name.removesuffix("-fp32"),
        )  # fmt: skip

    return replace(provider, layer=layer, leaves=(x, a, b))
