"""A JSON file that holds a list of objects, or questions in the nested form of SQuAD."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_kernels.errors import DataError
from lora_kernels.training.data.json_lines import objects_to_records
from lora_kernels.training.data.records import ReadOptions, Records
from lora_kernels.training.data.text_file import read_text

_ACCEPTED = "accepted: a list of objects, or SQuAD's {'data': [{'paragraphs': ...}]}"


def read(path: Path, options: ReadOptions) -> Records:
    """As :mod:`json_lines` reads its objects; SQuAD gives id, question, context and answers.

    Raises:
        DataError: another shape.
    """
    text, replaced = read_text(path, options)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: not JSON: {e}") from None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
        if value and isinstance(value[0], dict) and "paragraphs" in value[0]:
            try:
                value = list(_questions(value))
            except (KeyError, TypeError) as e:
                raise DataError(f"{path}: not SQuAD's form ({e!r}); {_ACCEPTED}") from None
    if not isinstance(value, list):
        raise DataError(f"{path}: a {type(value).__name__}; {_ACCEPTED}")
    notes = [f"{path}: {replaced} undecodable bytes replaced"] if replaced else []
    numbered = ((f"object {number}", item) for number, item in enumerate(value, 1))
    return objects_to_records(path, numbered, notes)


def _questions(articles: list[Any]) -> Iterator[dict[str, Any]]:
    for article in articles:
        for paragraph in article["paragraphs"]:
            for entry in paragraph["qas"]:
                answers = entry.get("answers", [])
                yield {
                    "id": entry.get("id", ""),
                    "question": entry["question"],
                    "context": paragraph["context"],
                    "answers": {
                        "text": [a["text"] for a in answers],
                        "answer_start": [a["answer_start"] for a in answers],
                    },
                }
