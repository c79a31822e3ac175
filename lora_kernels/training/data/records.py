"""Rows of named columns, the common form of all data files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from lora_kernels.errors import DataError


@dataclass(frozen=True)
class Records:
    """`rows` map each of `columns` to a text, or to the list or dictionary that the file holds.

    `source` names the file for messages, `notes` are for the user. `named_by_reader`: the file has
    no names of columns, so finding them is no guess.
    """

    rows: list[dict[str, Any]]
    columns: tuple[str, ...]
    source: str
    notes: list[str] = field(default_factory=list)
    named_by_reader: bool = False


@dataclass(frozen=True)
class ReadOptions:
    """How files become rows; as the keys of the same name in the section ``data``."""

    encoding: str = "utf-8"
    bad_bytes: str = "auto"
    documents: str = "auto"


def as_value(value: Any) -> Any:
    """Numbers and booleans as texts, nothing as the empty text, lists and dictionaries as they are.

    A number that is not a number becomes ``nan``, which no reader of labels accepts.
    """
    if value is None:
        return ""
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, (str, list, dict)):
        return value
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return str(value)


def text_of(row: dict[str, Any], column: str, records: Records, number: int) -> str:
    """The text in a column, stripped.

    Raises:
        DataError: it holds a list or an object.
    """
    value = row[column]
    if not isinstance(value, str):
        raise DataError(
            f"{records.source}, row {number}: {column!r} is a {type(value).__name__}; "
            "accepted: a text"
        )
    return value.strip()
