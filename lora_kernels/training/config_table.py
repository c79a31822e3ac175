"""Every key of a configuration with default and meaning: one table for --help and the page."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from dataclasses import dataclass
from typing import Any

from lora_kernels.training.config import Config

# Values of these are shown as what happens when they are absent.
_ABSENT = ""


@dataclass(frozen=True)
class Row:
    """One key: its dotted name, default as text, accepted words where they are few, meaning."""

    key: str
    default: str
    accepted: tuple[str, ...]
    meaning: str


def rows() -> list[Row]:
    """The keys in the order of the fields."""
    return list(_rows(Config, ""))


def _rows(cls: type, prefix: str) -> typing.Iterator[Row]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _rows(typing.cast(type, hints[f.name]), f"{prefix}{f.name}.")
            continue
        words = typing.get_args(hints[f.name])
        literal = typing.get_origin(hints[f.name]) is typing.Literal
        yield Row(prefix + f.name, _default(f), words if literal else (), f.metadata["help"])


def _default(f: Any) -> str:
    if f.metadata.get("required"):
        return "needed"
    value = f.default if f.default is not dataclasses.MISSING else f.default_factory()
    if value is None or value == "" or value == []:
        return _ABSENT
    return str(value).lower() if isinstance(value, bool) else str(value)


def help_text(width: int = 96) -> str:
    """The table for ``lora-kernels train --help``."""
    lines = ["keys (default in brackets):"]
    for row in rows():
        words = f" One of {', '.join(row.accepted)}." if row.accepted else ""
        default = f" [{row.default}]" if row.default else ""
        text = f"{row.meaning}.{words}{default}"
        lines.append(f"  {row.key}")
        lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def markdown_table() -> str:
    """The table for the documentation."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for row in rows():
        words = f"; one of {', '.join(f'`{w}`' for w in row.accepted)}" if row.accepted else ""
        default = f"`{row.default}`" if row.default not in ("", "needed") else row.default
        lines.append(f"| `{row.key}` | {default} | {row.meaning}{words} |")
    return "\n".join(lines)
