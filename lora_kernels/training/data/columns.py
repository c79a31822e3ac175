"""Which column holds what, when the user does not say."""

from __future__ import annotations

from lora_kernels.errors import DataError
from lora_kernels.training.data.records import Records

TEXT_NAMES = ("text", "sentence", "content", "document", "review", "comment", "message", "body",
              "description", "title", "question")  # fmt: skip
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "topic", "intent",
               "tag", "rating", "stars", "y")  # fmt: skip


def find_column(
    records: Records, key: str, given: str | None, names: tuple[str, ...], taken: str | None = None
) -> str:
    """The column called `given`, else the first usual name, else the only one left.

    Args:
        records: the rows.
        key: configuration key, for the message.
        given: the user's choice, or None.
        names: usual names, most telling first; case does not matter.
        taken: a column that is already in use.

    Raises:
        DataError: no such column, or no guess is possible.
    """
    available = ", ".join(repr(c) for c in records.columns)
    if given is not None:
        if given not in records.columns:
            raise DataError(f"{records.source}: no column {key}={given!r}; accepted: {available}")
        return given
    free = {c.strip().lower(): c for c in reversed(records.columns) if c != taken}
    for name in names:
        if name in free:
            return free[name]
    if len(free) == 1 and taken is not None:
        return next(iter(free.values()))
    raise DataError(
        f"{records.source}: cannot tell which column is {key}; set {key} to one of {available}"
    )
