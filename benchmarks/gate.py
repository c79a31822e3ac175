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
    """Oracle and yardstick of one case, computed once for all its providers."""

    def __init__(self) -> None:
        self._known: dict[float, tuple[LoraLinearResults, LoraLinearResults]] = {}

    def _expected(self, i: LoraLinearInputs) -> tuple[LoraLinearResults, LoraLinearResults]:
        if i.dropout_p not in self._known:
            oracle = lora_linear_results(i, torch.float64, needs="xab")
            self._known[i.dropout_p] = oracle, yardstick(i, oracle, "xab")
        return self._known[i.dropout_p]

    def check(self, provider: Provider, case: Case) -> Margin:
        """The worst margin over Y, dX, dA and dB. The baseline is torch itself: not judged.

        Raises:
            BudgetExceededError: with the figures.
        """
        if provider.name == BASELINE:
            return Margin(0.0, 0.0)
        judged = undropped(provider, case)
        if case.dropout_p and judged is provider:
            judged = _with_seed(provider, case)
        y, grads = judged.fwd().detach(), judged.fwdbwd()
        actual = LoraLinearResults([y], grads[0], [], [grads[1]], [grads[2]], [None])
        margins = compare(actual, *self._expected(judged.inputs), f"{provider.name}: ").values()
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
