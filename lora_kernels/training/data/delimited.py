"""Comma and tab separated files with a header line."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lora_kernels.errors import DataError
from lora_kernels.training.data.records import ReadOptions, Records
from lora_kernels.training.data.text_file import read_text

# One field may hold a whole document; the csv module's own limit is 128 KiB.
_LARGEST_FIELD = 1 << 30


def read(path: Path, options: ReadOptions) -> Records:
    """Columns are named by the first line.

    Raises:
        DataError: no header, a name twice in it, or a row with more fields than it has.
    """
    csv.field_size_limit(_LARGEST_FIELD)
    dialect = "excel-tab" if ".tsv" in path.suffixes[-2:] else "excel"
    text, replaced = read_text(path, options)
    reader = csv.DictReader(io.StringIO(text, newline=""), dialect=dialect)
    rows = []
    try:
        columns = tuple(reader.fieldnames or ())
        if not columns:
            raise DataError(f"{path}: the file is empty; accepted: a header line, then rows")
        twice = next((c for c in columns if columns.count(c) > 1), None)
        if twice is not None:
            raise DataError(f"{path}: column {twice!r} is there twice; accepted: different names")
        for row in reader:
            if None in row:
                raise DataError(
                    f"{path}, line {reader.line_num}: more fields than the "
                    f"{len(columns)} of the header; quote texts that hold the separator"
                )
            rows.append({c: row[c] or "" for c in columns})
    except csv.Error as e:
        raise DataError(f"{path}, line {reader.line_num}: {e}") from None
    notes = [f"{path}: {replaced} undecodable bytes replaced"] if replaced else []
    return Records(rows, columns, str(path), notes)
