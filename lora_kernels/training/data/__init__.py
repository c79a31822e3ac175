"""Readers of data files: one file each, ``read(path, options) -> Records``, named in `_READERS`.

Readers know nothing of tasks: they return rows of named columns.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from lora_kernels.errors import DataError
from lora_kernels.training.data.records import ReadOptions, Records

_READERS = {
    ".csv": "delimited",
    ".tsv": "delimited",
    ".jsonl": "json_lines",
    ".json": "json_file",
    ".parquet": "arrow_tables",
    ".txt": "plain_text",
}
_PACKED = ".gz"

__all__ = ["ReadOptions", "Records", "read_records"]


def read_records(path: Path, options: ReadOptions | None = None, split: str = "train") -> Records:
    """The rows of a file or folder.

    Args:
        split: of a folder that holds several, as datasets writes them.

    Raises:
        DataError: missing, unreadable, of a kind that no reader knows, or without a row.
        ConfigError: an encoding that Python does not know.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    options = options or ReadOptions()
    name = _reader(path)
    module = importlib.import_module(f"lora_kernels.training.data.{name}")
    try:
        if name == "arrow_tables":
            records: Records = module.read(path, options, split)
        else:
            records = module.read(path, options)
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror or e}") from None
    if not records.rows:
        raise DataError(f"{path}: no examples in it")
    return records


def _reader(path: Path) -> str:
    if path.is_dir():
        saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
        return "arrow_tables" if saved else "class_folders"
    suffix = path.suffix.lower()
    packed = suffix == _PACKED
    if packed:
        suffix = Path(path.stem).suffix.lower()
    reader = _READERS.get(suffix)
    if reader is None or (packed and reader == "arrow_tables"):
        raise DataError(
            f"{path}: files of kind {path.suffix or 'without a suffix'!r} are not read; "
            f"accepted: {', '.join(_READERS)}, also packed as .gz (but parquet), or a folder with "
            "one folder per class"
        )
    return reader
