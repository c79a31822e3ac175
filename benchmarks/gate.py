"""Correctness before speed: a provider that misses the error budget is not timed."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.providers import BASELINE, Case, Provider, op_layer, undropped
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
        if case.dropout_p and judged is provider and provider.name != "aten-padded":
            judged = _with_seed(provider, case)
        ys, grads, n = judged.fwd(), judged.fwdbwd(), len(case.outs)
        actual = LoraLinearResults(
            ys=[y.detach() for y in ys], dx=grads[0], dws=[], das=list(grads[1 : 1 + n]),
            dbs=list(grads[1 + n :]), dbiases=[None] * n,
        )  # fmt: skip
        margins = compare(actual, *self._expected(judged.inputs), f"{provider.name}: ").values()
        return Margin(max(m.max_norm for m in margins), max(m.rms for m in margins))


def _with_seed(provider: Provider, case: Case) -> Provider:
    """The same provider with the mask that the oracle draws."""
    i, backend = provider.inputs, provider.name.removesuffix("-fp32")
    return replace(provider, layer=op_layer(case, i, provider.leaves, backend, i.seed))
