"""What the ledger says about a GPU backend for one lora_linear problem."""

from __future__ import annotations

import math

from lora_kernels.ops import _ledger
from lora_kernels.ops.lora_linear.problem import LoraLinearProblem

OP = "lora_linear"
BACKENDS = ("cuda", "triton")
FLOOR = "aten"
# How far a measurement speaks for other sizes: a factor per axis.
_REACH = {"M": 4.0, "K": 2.0, "N": 2.0, "rank": 2.0}


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def distance(entry: _ledger.Entry, problem: LoraLinearProblem, direction: str) -> float | None:
    """Between the sizes, in octaves; None where the entry says nothing about the problem."""
    adapter = problem.adapter_dtype or problem.dtype
    same = (
        entry.direction == direction
        and entry.dtype == _name(problem.dtype)
        and entry.adapter_dtype == _name(adapter)
        and entry.dropout == (problem.dropout_p > 0.0)
        and len(entry.N) == len(problem.N)
    )
    if not same:
        return None
    axes = (
        ("M", entry.M, problem.M), ("K", entry.K, problem.K),
        ("N", sum(entry.N), sum(problem.N)), ("rank", sum(entry.rank), sum(problem.rank)),
    )  # fmt: skip
    total = 0.0
    for axis, measured, asked in axes:
        if asked < 1 or not 1 / _REACH[axis] <= asked / measured <= _REACH[axis]:
            return None
        total += abs(math.log2(asked / measured))
    return total


def _nearest(
    table: _ledger.Table, backend: str, problem: LoraLinearProblem, direction: str
) -> tuple[float, _ledger.Entry] | None:
    """(time over aten's, entry) of the nearest measurement; of equally near ones the worst."""
    found = [
        (d, -e.ms[backend] / e.ms[FLOOR], i)
        for i, e in enumerate(table.entries)
        if backend in e.ms and FLOOR in e.ms
        if (d := distance(e, problem, direction)) is not None
    ]
    if not found:
        return None
    _, ratio, i = min(found)
    return -ratio, table.entries[i]


def _judge(backend: str, problem: LoraLinearProblem, direction: str) -> tuple[float | None, str]:
    """(time over aten's, reason), or (None, why there is no evidence)."""
    here = _ledger.device(problem.device_index)
    if here is None:
        return None, "torch sees no GPU here"
    tables, refused = _ledger.read(_ledger.folder(OP), OP)
    because = "".join(f"; {line}" for line in refused)
    table = _ledger.table_for(here, tables)
    verdict = table.backends.get(backend) if table else None
    if table is None or verdict is None or verdict["verdict"] == "not run":
        return None, (
            f"never run on hardware of this kind ({here.name}, {here.architecture}): "
            f"no result of make gpu-check{because}"
        )
    where = f"{table.device.name}, {table.date[:10]}, commit {table.commit}"
    if verdict["verdict"] == "failed":
        return None, f"failed its checks ({where})"
    if verdict["digest"] != _ledger.digest(OP, backend, table.configs):
        return None, f"its sources changed since they were measured ({where}); run make gpu-check"
    nearest = _nearest(table, backend, problem, direction)
    if nearest is None:
        return None, f"no measurement near this problem ({where})"
    ratio, entry = nearest
    sizes = f"M={entry.M} K={entry.K} N={sum(entry.N)} rank={sum(entry.rank)}"
    return ratio, f"{ratio:.2f} of the time of aten at {sizes} {direction} ({where})"


def preferred(backend: str, problem: LoraLinearProblem, direction: str) -> tuple[bool, str]:
    """May `auto` pick it: it passed its checks on such a device, from these very sources, and was
    at least as quick as aten at the nearest size that was measured."""
    ratio, why = _judge(backend, problem, direction)
    return ratio is not None and ratio <= 1.0, why


def order(problem: LoraLinearProblem, direction: str) -> tuple[str, ...]:
    """The backends in the order in which `auto` asks them: the quickest first."""
    ratios = {b: _judge(b, problem, direction)[0] for b in BACKENDS}
    return tuple(sorted(BACKENDS, key=lambda b: math.inf if (r := ratios[b]) is None else r))
