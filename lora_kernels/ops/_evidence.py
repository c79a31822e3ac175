"""What the ledger says about a GPU backend for one problem, and the choice that follows from it.

No op is named here. An op passes its name, the backends it has, its problem and its predicate; a
problem that needs another view of itself than :func:`key_of` has a method ``evidence_key()``.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from lora_kernels.ops import _dispatch, _ledger

BACKENDS = ("cuda", "triton")
FLOOR = "aten"
# How far a measurement speaks for other sizes: a factor per axis, rows reach farther.
_REACH = {"M": 4.0, "B": 4.0, "S": 4.0, "Sk": 4.0}
_ELSEWHERE = 2.0
_PLACES = ("device", "device_index")
Able = Callable[[str, Any], "tuple[bool, str]"]


@dataclass(frozen=True)
class Key:
    """A problem as measurements tell it: `sizes`, which may differ by a factor, and `kind`, which
    may not. Both hold what JSON holds."""

    sizes: Mapping[str, int]
    kind: Mapping[str, Any]


def name_of(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def key_of(problem: Any) -> Key:
    """The problem's own ``evidence_key()``, else that of all its fields."""
    own = getattr(problem, "evidence_key", None)
    return fields_key(problem) if own is None else own()


def fields_key(problem: Any, exact: tuple[str, ...] = ()) -> Key:
    """From the fields of a dataclass: whole numbers above 0 that are not in `exact` are sizes;
    of a probability or a cap only counts whether there is one."""
    sizes: dict[str, int] = {}
    kind: dict[str, Any] = {}
    for field in fields(problem):
        value, name = getattr(problem, field.name), field.name
        if name in _PLACES:
            continue
        if type(value) is int and value > 0 and name not in exact:
            sizes[name] = value
        elif isinstance(value, float):
            kind[name] = value != 0.0
        elif isinstance(value, torch.dtype):
            kind[name] = name_of(value)
        else:
            kind[name] = list(value) if isinstance(value, tuple) else value
    return Key(sizes, kind)


def distance(entry: _ledger.Entry, key: Key, direction: str) -> float | None:
    """Between the sizes, in octaves; None where the entry says nothing about the problem."""
    same = (
        entry.direction == direction
        and entry.kind == dict(key.kind)
        and set(entry.sizes) == set(key.sizes)
    )
    if not same:
        return None
    total = 0.0
    for axis, measured in entry.sizes.items():
        asked, reach = key.sizes[axis], _REACH.get(axis, _ELSEWHERE)
        if asked < 1 or not 1 / reach <= asked / measured <= reach:
            return None
        total += abs(math.log2(asked / measured))
    return total


def _nearest(
    table: _ledger.Table, backend: str, key: Key, direction: str
) -> tuple[float, _ledger.Entry] | None:
    """(time over aten's, entry) of the nearest measurement; of equally near ones the worst."""
    found = [
        (d, -e.ms[backend] / e.ms[FLOOR], i)
        for i, e in enumerate(table.entries)
        if backend in e.ms and FLOOR in e.ms and (d := distance(e, key, direction)) is not None
    ]
    if not found:
        return None
    _, ratio, i = min(found)
    return -ratio, table.entries[i]


def judge(
    op: str, backend: str, key: Key, direction: str, here: _ledger.Device | None
) -> tuple[float | None, str]:
    """(time over aten's, reason), or (None, why there is no evidence)."""
    if here is None:
        return None, "torch sees no GPU here"
    tables, refused = _ledger.read(_ledger.folder(op), op)
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
    if verdict["digest"] != _ledger.digest(op, backend, table.configs):
        return None, f"its sources changed since they were measured ({where}); run make gpu-check"
    nearest = _nearest(table, backend, key, direction)
    if nearest is None:
        return None, f"no measurement near this problem ({where})"
    ratio, entry = nearest
    sizes = " ".join(f"{axis}={n}" for axis, n in entry.sizes.items())
    return ratio, f"{ratio:.2f} of the time of aten at {sizes} {direction} ({where})"


def choose(
    op: str, backends: tuple[str, ...], problem: Any, direction: str, supports: Able
) -> tuple[str, str]:
    """(backend, reason) of ``auto`` for a problem on a GPU, in one direction, ``fwd`` or ``bwd``.

    A backend is taken where it can run the problem, passed its checks on such a device from these
    very sources, and was at least as quick as `aten` at the nearest size that was measured; of
    several the quickest. Otherwise `aten`, and the reason names what each of the others lacks.
    """
    index = getattr(problem, "device_index", None)
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    disabled = os.environ.get("LORA_KERNELS_DISABLE", "")
    return _choose(op, backends, problem, direction, supports, index, disabled)


@functools.lru_cache(maxsize=4096)
def _choose(
    op: str, backends: tuple[str, ...], problem: Any, direction: str, supports: Able, index: int,
    disabled: str,
) -> tuple[str, str]:  # fmt: skip
    """Cached on all that the answer depends on: `disabled` serves the key alone."""
    key, here = key_of(problem), _ledger.device(index)
    told = {b: judge(op, b, key, direction, here) for b in BACKENDS if b in backends}

    def able(backend: str) -> tuple[bool, str]:
        can, why = supports(backend, problem)
        ratio, evidence = told[backend]
        return (can, why) if not can else (ratio is not None and ratio <= 1.0, evidence)

    quickest = sorted(told, key=lambda b: math.inf if (r := told[b][0]) is None else r)
    return _dispatch.resolve(op, "auto", tuple(quickest), able)


def forget() -> None:
    """Read the tables and judge anew: for the tuner and tests."""
    _ledger.read.cache_clear()
    _choose.cache_clear()
