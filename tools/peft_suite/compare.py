"""The verdict: two runs of the same tests, one stock and one fused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Run:
    """What the plugin recorded.

    Outcome per test; fused calls and the tests that made them; LoRA layers by what `apply` said of
    them, ``fused`` or the reason; calls of fused layers that fell back, by reason.
    """

    outcomes: dict[str, str]
    fused_calls: int = 0
    tests_with_fused_calls: int = 0
    layers: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Run:
        return cls(**data)

    def count(self, outcome: str) -> int:
        return Counter(self.outcomes.values())[outcome]


def problems(stock: Run, fused: Run, floor: int) -> list[str]:
    """Why the fused run is not as good as the stock one; nothing when it is."""
    found = []
    if not stock.count("passed"):
        found.append("no test passed stock: nothing was compared")
    for test, outcome in stock.outcomes.items():
        if outcome == "passed" and fused.outcomes.get(test) != "passed":
            found.append(f"passes stock, {fused.outcomes.get(test, 'did not run')} fused: {test}")
    if stock.fused_calls:
        found.append(f"{stock.fused_calls} fused calls in the stock run, which should have none")
    if fused.fused_calls < floor:
        found.append(f"{fused.fused_calls} fused calls are fewer than the floor of {floor}")
    return found


def table(stock: Run, fused: Run) -> str:
    columns = ("passed", "failed", "skipped", "fused calls")
    lines = [f"{'':8}" + "".join(f"{c:>13}" for c in columns)]
    for name, run in (("stock", stock), ("fused", fused)):
        cells = [*(run.count(outcome) for outcome in columns[:3]), run.fused_calls]
        lines.append(f"{name:8}" + "".join(f"{cell:>13}" for cell in cells))
    lines.append(f"{fused.tests_with_fused_calls} tests called a fused layer")
    for counts, what in (
        (fused.layers, "LoRA layers"),
        (fused.fallbacks, "calls of fused layers ran PEFT's forward"),
    ):
        ordered = sorted(counts.items(), key=lambda item: -item[1])
        lines += [f"{n:>8} {what}: {reason}" for reason, n in ordered]
    return "\n".join(lines)
