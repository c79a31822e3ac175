"""What the language models share: which columns hold text, splits of one long text, packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_kernels.errors import ConfigError, DataError
from lora_kernels.training.config import Config, DataConfig
from lora_kernels.training.data.chat import from_prompt, read_messages
from lora_kernels.training.data.columns import (
    MESSAGE_NAMES,
    PROMPT_NAMES,
    RESPONSE_NAMES,
    TEXT_NAMES,
    find_column,
    guesses,
    usual_column,
)
from lora_kernels.training.data.records import Records, text_of
from lora_kernels.training.data.split import Split, grouped_split
from lora_kernels.training.data.splits import read_splits

TEXT, CHAT = "text", "chat"
_MORE = "input"  # Alpaca's column for what an instruction is about


def read_documents(records: Records, notes: list[str], data: DataConfig) -> tuple[str, list[Any]]:
    """(``text`` or ``chat``, examples).

    Columns that the configuration names decide; else messages come before prompt and response, and
    these before a text.

    Raises:
        DataError: no column fits, or a conversation has no answer.
    """
    if data.text is None:
        messages = usual_column(records, "data.messages", data.messages, MESSAGE_NAMES)
        if messages is not None and (data.messages or isinstance(records.rows[0][messages], list)):
            found = guesses({"messages": data.messages}, {"messages": messages})
            examples = [
                read_messages(row[messages], f"{records.source}, row {number}")
                for number, row in enumerate(records.rows, 1)
            ]
            return CHAT, _noted(examples, records, notes, found)
        prompt = usual_column(records, "data.prompt", data.prompt, PROMPT_NAMES)
        response = usual_column(
            records, "data.response", data.response, RESPONSE_NAMES, taken=prompt
        )
        if prompt is not None and response is not None:
            return CHAT, _prompts(records, notes, data, prompt, response)
        if data.prompt is not None or data.response is not None:
            raise DataError(
                f"{records.source}: data.prompt and data.response belong together; set both"
            )
    column = find_column(records, "data.text", data.text, TEXT_NAMES)
    texts = [text_of(row, column, records, n) for n, row in enumerate(records.rows, 1)]
    return TEXT, _noted(
        [t for t in texts if t], records, notes, guesses({"text": data.text}, {"text": column})
    )


def _prompts(
    records: Records, notes: list[str], data: DataConfig, prompt: str, response: str
) -> list[Any]:
    more = _MORE if _MORE in records.columns and _MORE not in (prompt, response) else None
    examples = []
    for number, row in enumerate(records.rows, 1):
        asked = text_of(row, prompt, records, number)
        answer = text_of(row, response, records, number)
        about = text_of(row, more, records, number) if more else ""
        if asked and answer:
            examples.append(from_prompt(asked, about, answer))
    given = {"prompt": data.prompt, "response": data.response}
    found = guesses(given, {"prompt": prompt, "response": response, "input": more})
    return _noted(examples, records, notes, found)


def _noted(examples: list[Any], records: Records, notes: list[str], guessed: str) -> list[Any]:
    dropped = len(records.rows) - len(examples)
    guessed = "" if records.named_by_reader else guessed
    parts = [f"{records.source}: {len(examples)} examples", guessed]
    parts.append(f"{dropped} empty ones left out" if dropped else "")
    notes.append(", ".join(part for part in parts if part))
    return examples


def read_language_splits(
    config: Config, read: Callable[[Records, list[str]], list[Any]], notes: list[str]
) -> dict[str, list[Any]]:
    """Splits by whole documents. A file that is one document and has to serve for the test too is
    cut at its lines instead, the test at its end."""
    data = config.data
    cuts: list[bool] = []

    def read_or_cut(records: Records, notes: list[str]) -> list[Any]:
        examples = read(records, notes)
        shares = [
            0.0 if given else share
            for given, share in (
                (data.validation, data.validation_fraction),
                (data.test, data.test_fraction),
            )
        ]
        if cuts or len(examples) > 1 or not isinstance(examples[0], str) or not any(shares):
            cuts.append(False)
            return examples
        if data.limit is not None:
            raise ConfigError(
                f"data.limit={data.limit} counts documents, and {records.source} is one; leave it "
                "out, or give data.documents=line"
            )
        cuts.append(True)
        notes.append(f"{records.source}: one document; its last lines are held out")
        return cut_text(examples[0], *shares)

    def divide(examples: Any, validation: float, test: float) -> Split:
        if cuts[0]:
            return [0], [1] if examples[1] else [], [2] if examples[2] else []
        groups = [str(i) for i in range(len(examples))]
        return grouped_split(groups, validation, test, config.seed, data.limit)

    return read_splits(config, read_or_cut, divide, notes)


def cut_text(text: str, validation: float, test: float) -> list[str]:
    """One text as three, in its order and at line ends: for training, validation and test.

    Parts with a share of zero are empty. The shares are of the characters, as nearly as the lines
    allow; a text of one line is cut between words.
    """
    joint = "\n" if "\n" in text.strip() else " "
    lines = text.strip().split(joint)
    ends = [1.0 - validation - test, 1.0 - test, 1.0]
    total, position, part = sum(len(line) + 1 for line in lines), 0, 0
    parts: list[list[str]] = [[], [], []]
    for line in lines:
        middle = (position + (len(line) + 1) / 2) / total
        while part < 2 and middle > ends[part]:
            part += 1
        parts[part].append(line)
        position += len(line) + 1
    return [joint.join(lines) for lines in parts]


def keep_apart(packing: str, model: Any, tokenizer: Any) -> tuple[str, str, str]:
    """(packing, how the model is told where documents begin, a line for the user).

    Raises:
        ConfigError: ``documents`` is asked for and the model does not keep them apart.
    """
    if packing == "none":
        return packing, "", "packing: none, a document per row and padding"
    if packing == "stream":
        return packing, "", "packing: one stream of text; documents see those before them"
    from lora_kernels.training.data.language_batches import way_apart

    way, reason = way_apart(model, tokenizer.pad_token_id, model.dtype)
    if way is not None:
        return "documents", way, f"packing: whole documents per row, kept apart by {way} (checked)"
    if packing == "documents":
        raise ConfigError(
            f"data.packing=documents: {type(model).__name__} does not keep documents apart: "
            f"{reason}; accepted for this model: auto, none, stream"
        )
    return "none", "", f"packing: none, a document per row and padding, as {reason}"
