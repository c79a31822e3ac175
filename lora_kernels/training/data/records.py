"""Rows of named text columns, the common form of all data files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Records:
    """`rows` map each of `columns` to a text; `source` names the file for messages."""

    rows: list[dict[str, str]]
    columns: tuple[str, ...]
    source: str
