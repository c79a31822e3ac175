"""Interleaved wall-clock timing.

Providers take turns within every round and the turn order rotates, so a slow second of a shared
machine hits all of them alike. A ratio is taken per round, then its median; a ratio of two
medians would mix rounds that saw different machines.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Work = Callable[[], object]
Timed = Callable[[Work, int], float]


@dataclass(frozen=True)
class Quartiles:
    """Median with the first and third quartile."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: list[float]) -> Quartiles:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one provider, and its ratio to the baseline of the same round."""

    seconds: Quartiles
    ratio: Quartiles
    first_call: float
    calls_per_round: int
    rounds: int


def wall_clock(work: Work, calls: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


class DeviceClock:
    """Seconds per call between two events on the device.

    `event()` makes an event with ``record``, ``synchronize`` and ``elapsed_time`` (milliseconds),
    such as ``torch.cuda.Event(enable_timing=True)``. `cold()` is called before each turn; it
    evicts what an earlier turn left in the caches.
    """

    def __init__(self, event: Callable[[], Any], cold: Work = lambda: None) -> None:
        self.event, self.cold = event, cold

    def __call__(self, work: Work, calls: int) -> float:
        start, end = self.event(), self.event()
        self.cold()
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls


def measure(
    works: dict[str, Work],
    baseline: str,
    *,
    rounds: int = 15,
    round_seconds: float = 0.03,
    warm_up: int = 3,
    timed: Timed = wall_clock,
    after_round: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time every work against works[baseline].

    Args:
        rounds: how often each provider has its turn.
        round_seconds: least duration of a turn; short works are called several times in it.
        warm_up: calls before timing; the first of them is reported as `first_call` (packing,
            compilation and allocation happen there).
        timed: the clock; it waits for what it times.
        after_round: called once per round, untimed: what it measures saw the same machine.
    """
    first, calls = {}, {}
    for name, work in works.items():
        first[name] = timed(work, 1)
        settled = min(timed(work, 1) for _ in range(max(warm_up - 1, 1)))
        calls[name] = max(1, round(round_seconds / settled))
    samples: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(timed(works[name], calls[name]))
        if after_round is not None:
            after_round()
    return {
        name: Timing(
            seconds=Quartiles.of(samples[name]),
            ratio=Quartiles.of(
                [t / base for t, base in zip(samples[name], samples[baseline], strict=True)]
            ),
            first_call=first[name],
            calls_per_round=calls[name],
            rounds=rounds,
        )
        for name in names
    }
