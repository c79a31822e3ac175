"""Tiles that the tuner found quicker than the analytic default, by architecture and size.

`tuned/<device>.json` holds them beside the measurements that were made with them. A tile counts
for the very output width, rank and dtype it was measured with, and for up to twice or half as
many rows; anything else takes the default of configs.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from lora_kernels.ops import _ledger

OP = "lora_linear"
_REACH = 2.0


def lookup(kernel: str, architecture: str, rows: int, **key: Any) -> Mapping[str, Any] | None:
    """Fields of the tuned configuration of a Triton kernel, or None."""
    return _lookup(kernel, architecture, rows, tuple(sorted(key.items())))


@functools.lru_cache(maxsize=4096)
def _lookup(
    kernel: str, architecture: str, rows: int, key: tuple[tuple[str, Any], ...]
) -> Mapping[str, Any] | None:
    found = []
    for number, entry in enumerate(_configs(architecture)):
        if entry["kernel"] == kernel and entry["key"] == dict(key):
            far = max(rows, entry["rows"]) / max(1, min(rows, entry["rows"]))
            if far <= _REACH:
                found.append((far, number, entry["config"]))
    return min(found)[2] if found else None


@functools.cache
def _configs(architecture: str) -> tuple[dict[str, Any], ...]:
    """Of this device's table, else of the newest one of the architecture. None of them once the
    kernels have changed; what lacks a field is left out."""
    tables, _ = _ledger.read(_ledger.folder(OP), OP)
    here = _ledger.device(0)
    exact = here if here and here.architecture == architecture else None
    table = _ledger.table_for(exact or _ledger.Device("", architecture), tables)
    entries = _ledger.tiles_in_force(OP, table)
    return tuple(e for e in entries if {"kernel", "key", "rows", "config"} <= set(e))


def forget() -> None:
    """Read the tables again: for the tuner and tests."""
    _ledger.read.cache_clear()
    _configs.cache_clear()
    _lookup.cache_clear()
