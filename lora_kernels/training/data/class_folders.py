"""A folder with one folder per class, each text in a .txt file of its own."""

from __future__ import annotations

from pathlib import Path

from lora_kernels.errors import DataError
from lora_kernels.training.data.records import ReadOptions, Records
from lora_kernels.training.data.text_file import read_text


def read(path: Path, options: ReadOptions) -> Records:
    """Columns ``text`` and ``label`` (the folder's name), in the order of the file names.

    Hidden folders and other files are left alone.

    Raises:
        DataError: `path` has no folder with .txt files.
    """
    rows, damaged = [], 0
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != "."):
        for file in sorted(folder.glob("*.txt")):
            text, replaced = read_text(file, options, one_of_many=True)
            damaged += replaced > 0
            rows.append({"text": text, "label": folder.name})
    if not rows:
        raise DataError(
            f"{path}: no .txt files in it; accepted: one folder of .txt files per class"
        )
    notes = []
    if damaged:
        notes.append(
            f"{path}: {damaged} of {len(rows)} files are not {options.encoding}; their "
            "undecodable bytes were replaced"
        )
    return Records(rows, ("text", "label"), str(path), notes, named_by_reader=True)
