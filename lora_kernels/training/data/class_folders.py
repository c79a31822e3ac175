"""A folder with one folder per class, each text in a .txt file of its own."""

from __future__ import annotations

from pathlib import Path

from lora_kernels.errors import DataError
from lora_kernels.training.data.records import Records


def read(path: Path) -> Records:
    """Columns ``text`` and ``label`` (the folder's name), in the order of the file names.

    Bytes that are not UTF-8 are replaced; hidden folders and other files are left alone.

    Raises:
        DataError: `path` has no folder with .txt files.
    """
    rows = []
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != "."):
        for file in sorted(folder.glob("*.txt")):
            text = file.read_text(encoding="utf-8", errors="replace")
            rows.append({"text": text, "label": folder.name})
    if not rows:
        raise DataError(
            f"{path}: no .txt files in it; accepted: one folder of .txt files per class"
        )
    return Records(rows, ("text", "label"), str(path))
