"""Readers of data files: one file each, with ``read(path) -> Records``, named in `_READERS`.

Readers know nothing of tasks: they return rows of named text columns.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from lora_kernels.errors import DataError
from lora_kernels.training.data.records import Records

_READERS = {".csv": "delimited", ".tsv": "delimited", ".jsonl": "json_lines"}
_FOLDER = "class_folders"

__all__ = ["Records", "read_records"]


def read_records(path: Path) -> Records:
    """The rows of a file or folder.

    Raises:
        DataError: missing, unreadable, of a kind that no reader knows, or without a row.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    reader = _FOLDER if path.is_dir() else _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: files of kind {path.suffix or 'without a suffix'!r} are not read; "
            f"accepted: {', '.join(_READERS)}, or a folder with one folder per class"
        )
    module = importlib.import_module(f"lora_kernels.training.data.{reader}")
    try:
        records: Records = module.read(path)
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror or e}") from None
    if not records.rows:
        raise DataError(f"{path}: no examples in it")
    return records
