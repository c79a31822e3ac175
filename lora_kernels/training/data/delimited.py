"""Comma and tab separated files with a header line."""

from __future__ import annotations

import csv
from pathlib import Path

from lora_kernels.errors import DataError
from lora_kernels.training.data.records import Records

# One field may hold a whole document; the csv module's own limit is 128 KiB.
_LARGEST_FIELD = 1 << 30


def read(path: Path) -> Records:
    """Columns are named by the first line; bytes that are not UTF-8 are replaced.

    Raises:
        DataError: no header, or a row with more fields than the header.
    """
    csv.field_size_limit(_LARGEST_FIELD)
    dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
    rows = []
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file, dialect=dialect)
        try:
            columns = tuple(reader.fieldnames or ())
            if not columns:
                raise DataError(f"{path}: the file is empty; accepted: a header line, then rows")
            for row in reader:
                if None in row:
                    raise DataError(
                        f"{path}, line {reader.line_num}: more fields than the "
                        f"{len(columns)} of the header; quote texts that hold the separator"
                    )
                rows.append({c: row[c] or "" for c in columns})
        except csv.Error as e:
            raise DataError(f"{path}, line {reader.line_num}: {e}") from None
    return Records(rows, columns, str(path))
