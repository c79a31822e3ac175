"""Which column holds what, when the user does not say."""

from __future__ import annotations

from typing import TypeAlias

from lora_kernels.errors import DataError
from lora_kernels.training.data.records import Records

TEXT_NAMES = ("text", "sentence", "content", "document", "review", "comment", "message", "body",
              "description", "title", "question")  # fmt: skip
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "topic", "intent",
               "tag", "rating", "stars", "y")  # fmt: skip
SOURCE_NAMES = ("source", "src", "input", "document", "article", "text", "dialogue", "en",
                "english", "question", "prompt")  # fmt: skip
TARGET_NAMES = ("target", "tgt", "summary", "highlights", "output", "translation", "reference",
                "answer", "response", "label")  # fmt: skip
PROMPT_NAMES = ("instruction", "prompt", "question", "query", "input", "user")
RESPONSE_NAMES = ("output", "response", "completion", "answer", "assistant", "chosen")
MESSAGE_NAMES = ("messages", "conversations", "conversation", "dialog", "chat")
QUESTION_NAMES = ("question", "query")
CONTEXT_NAMES = ("context", "passage", "paragraph", "document", "article", "text")
ANSWER_NAMES = ("answers", "answer", "answer_text")
TOKEN_NAMES = ("tokens", "words", "sentence", "text")
TAG_NAMES = ("ner_tags", "tags", "labels", "ner", "pos_tags", "pos", "label")


Taken: TypeAlias = "str | tuple[str, ...] | None"


def find_column(
    records: Records, key: str, given: str | None, names: tuple[str, ...], taken: Taken = None
) -> str:
    """The column called `given`, else the first usual name, else the only one left.

    Args:
        records: the rows.
        key: configuration key, for the message.
        given: the user's choice, or None.
        names: usual names, most telling first; case does not matter.
        taken: columns that are already in use.

    Raises:
        DataError: no such column, or no guess is possible.
    """
    found = usual_column(records, key, given, names, taken)
    if found is not None:
        return found
    used = _used(taken)
    free = [c for c in records.columns if c not in used]
    if len(free) == 1 and used:
        return free[0]
    raise DataError(
        f"{records.source}: cannot tell which column is {key}; set {key} to one of "
        + _listed(records)
    )


def usual_column(
    records: Records, key: str, given: str | None, names: tuple[str, ...], taken: Taken = None
) -> str | None:
    """As :func:`find_column`, but None where no usual name is there."""
    if given is not None:
        if given not in records.columns:
            raise DataError(
                f"{records.source}: no column {key}={given!r}; accepted: {_listed(records)}"
            )
        return given
    used = _used(taken)
    free = {c.strip().lower(): c for c in reversed(records.columns) if c not in used}
    return next((free[name] for name in names if name in free), None)


def _used(taken: Taken) -> tuple[str, ...]:
    if taken is None:
        return ()
    return (taken,) if isinstance(taken, str) else taken


def guesses(given: dict[str, str | None], found: dict[str, str | None]) -> str:
    """``columns guessed: text='review'`` for the columns that were not given, or nothing."""
    shown = [f"{name}={column!r}" for name, column in found.items()
             if column is not None and given.get(name) is None]  # fmt: skip
    return f"columns guessed: {', '.join(shown)}" if shown else ""


def _listed(records: Records) -> str:
    return ", ".join(repr(c) for c in records.columns)
