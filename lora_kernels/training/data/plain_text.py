"""A .txt file: one column ``text`` with a document per row."""

from __future__ import annotations

import re
from pathlib import Path

from lora_kernels.training.data.records import ReadOptions, Records
from lora_kernels.training.data.text_file import read_text

_BLANK_LINES = re.compile(r"\n[ \t\r]*\n\s*")
_NAMES = {"line": "lines", "block": "blocks between blank lines", "file": "whole file"}


def read(path: Path, options: ReadOptions) -> Records:
    """Documents are lines, blocks between blank lines, or the whole file."""
    text, replaced = read_text(path, options)
    kind = options.documents
    if kind == "auto":
        kind = "block" if _BLANK_LINES.search(text.strip()) else "line"
    if kind == "file":
        documents = [text]
    elif kind == "block":
        documents = _BLANK_LINES.split(text)
    else:
        documents = text.split("\n")
    rows = [{"text": d.strip()} for d in documents if d.strip()]
    notes = [f"{path}: {replaced} undecodable bytes replaced"] if replaced else []
    if options.documents == "auto" and len(rows) > 1:
        notes.append(f"{path}: documents guessed: {_NAMES[kind]} (data.documents={kind})")
    return Records(rows, ("text",), str(path), notes, named_by_reader=True)
