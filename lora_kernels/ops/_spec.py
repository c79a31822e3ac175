"""What an op is, as data: read by tests, benchmarks, docs and `explain`; never by dispatch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OpSpec:
    """One row of the registry.

    `problem` builds the op's problem description from keyword shapes and raises
    InvalidArgumentError on an unknown one; `supports(backend, problem)` answers (able, reason);
    `choose(problem, requested)` gives the backend that would run and why.
    `flops` and `min_bytes` count one forward or backward of the ideal kernel.
    """

    name: str
    backends: tuple[str, ...]
    schemas: tuple[str, ...]
    problem: Callable[..., Any]
    supports: Callable[[str, Any], tuple[bool, str]]
    choose: Callable[[Any, str | None], tuple[str, str]]
    flops: Callable[[Any, str], float]
    min_bytes: Callable[[Any, str], float]
    deterministic: str
