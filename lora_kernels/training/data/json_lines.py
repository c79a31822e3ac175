"""JSON lines: one object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_kernels.errors import DataError
from lora_kernels.training.data.records import Records


def read(path: Path) -> Records:
    """Columns are the keys of the first object; numbers and booleans become texts.

    Raises:
        DataError: a line is no JSON object, or lacks a column of the first one.
    """
    rows: list[dict[str, str]] = []
    columns: tuple[str, ...] = ()
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as e:
                raise DataError(f"{path}, line {number}: not JSON: {e}") from None
            if not isinstance(value, dict):
                raise DataError(
                    f"{path}, line {number}: a {type(value).__name__}; accepted: a JSON object"
                )
            columns = columns or tuple(value)
            missing = [c for c in columns if c not in value]
            if missing:
                raise DataError(f"{path}, line {number}: key {missing[0]!r} is missing")
            rows.append({c: _as_text(value[c]) for c in columns})
    return Records(rows, columns, str(path))


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
