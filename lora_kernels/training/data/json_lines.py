"""JSON lines: one object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_kernels.errors import DataError
from lora_kernels.training.data.records import ReadOptions, Records, as_value
from lora_kernels.training.data.text_file import read_text


def read(path: Path, options: ReadOptions) -> Records:
    """Columns are the keys of the first object; numbers and booleans become texts.

    Raises:
        DataError: a line is no JSON object, or lacks a column of the first one.
    """
    text, replaced = read_text(path, options)
    # Not splitlines: JSON texts may hold other line separators of Unicode as they are.
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    values = ((f"line {number}", _parse(path, number, line)) for number, line in lines)
    notes = [f"{path}: {replaced} undecodable bytes replaced"] if replaced else []
    return objects_to_records(path, values, notes)


def _parse(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}, line {number}: not JSON: {e}") from None


def objects_to_records(path: Path, values: Any, notes: list[str]) -> Records:
    """From (where, object) pairs.

    Raises:
        DataError: one is no object, or lacks a column of the first one.
    """
    rows: list[dict[str, Any]] = []
    columns: tuple[str, ...] = ()
    for where, value in values:
        if not isinstance(value, dict):
            raise DataError(f"{path}, {where}: a {type(value).__name__}; accepted: a JSON object")
        columns = columns or tuple(value)
        missing = [c for c in columns if c not in value]
        if missing:
            raise DataError(f"{path}, {where}: key {missing[0]!r} is missing")
        rows.append({c: as_value(value[c]) for c in columns})
    return Records(rows, columns, str(path), notes)
