"""Tiles that the tuner found quicker than an op's analytic default, by architecture and size.

`ops/<op>/tuned/<device>.json` holds them beside the measurements that were made with them. A tile
counts for the very key it was measured with, and for up to twice or half as many rows; where the
number of rows must not decide, the op always asks for one. Anything else takes the default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lora_kernels.ops import _ledger

_REACH = 2.0
Asked = tuple[str, str, int, tuple[tuple[str, Any], ...]]  # kernel, architecture, rows, key
Entry = Mapping[str, Any]


def entry_of(asked: Asked, config: Mapping[str, Any]) -> dict[str, Any]:
    """As a table holds it."""
    kernel, architecture, rows, key = asked
    return {
        "backend": "triton", "kernel": kernel, "architecture": architecture, "rows": rows,
        "key": dict(key), "config": dict(config),
    }  # fmt: skip


class TunedTiles:
    """Of one op."""

    def __init__(self, op: str) -> None:
        self.op = op
        self._asked: dict[Asked, Any] | None = None  # look-ups and defaults, while they are noted
        self._tried: tuple[Entry, ...] | None = None  # instead of the tables
        self._known: dict[Asked, Mapping[str, Any] | None] = {}
        self._tables: dict[str, tuple[Entry, ...]] = {}

    def lookup(
        self, kernel: str, architecture: str, rows: int, default: Any, **key: Any
    ) -> Mapping[str, Any] | None:
        """Fields of the tuned configuration of a Triton kernel, or None."""
        asked = (kernel, architecture, rows, tuple(sorted(key.items())))
        if self._asked is not None:
            self._asked.setdefault(asked, default)
            return None
        if self._tried is not None:
            return _nearest(self._tried, asked)
        if asked not in self._known:
            self._known[asked] = _nearest(self._in_force(architecture), asked)
        return self._known[asked]

    def _in_force(self, architecture: str) -> tuple[Entry, ...]:
        """Of this device's table, else of the newest one of the architecture. None of them once
        the kernels have changed; what lacks a field is left out."""
        if architecture not in self._tables:
            tables, _ = _ledger.read(_ledger.folder(self.op), self.op)
            here = _ledger.device(0)
            exact = here if here and here.architecture == architecture else None
            table = _ledger.table_for(exact or _ledger.Device("", architecture), tables)
            entries = _ledger.tiles_in_force(self.op, table)
            whole = tuple(e for e in entries if {"kernel", "key", "rows", "config"} <= set(e))
            self._tables[architecture] = whole
        return self._tables[architecture]

    def forget(self) -> None:
        """Read the tables again: for the tuner and tests."""
        _ledger.read.cache_clear()
        self._known.clear()
        self._tables.clear()

    @contextmanager
    def recorded(self) -> Iterator[dict[Asked, Any]]:
        """Inside, every look-up and its default are noted and nothing is found."""
        before, self._asked = self._asked, {}
        try:
            yield self._asked
        finally:
            self._asked = before

    @contextmanager
    def installed(self, entries: tuple[Entry, ...]) -> Iterator[None]:
        """Inside, look-ups find these tiles and no others."""
        before, self._tried = self._tried, entries
        try:
            yield
        finally:
            self._tried = before


def _nearest(entries: tuple[Entry, ...], asked: Asked) -> Mapping[str, Any] | None:
    kernel, _, rows, key = asked
    found = []
    for number, entry in enumerate(entries):
        if entry["kernel"] == kernel and entry["key"] == dict(key):
            far = max(rows, entry["rows"]) / max(1, min(rows, entry["rows"]))
            if far <= _REACH:
                found.append((far, number, entry["config"]))
    return min(found)[2] if found else None
