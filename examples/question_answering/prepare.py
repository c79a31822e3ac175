"""Who said it? Questions that BBC articles answer themselves.

Where a sentence of an article says who spoke and quotes what was said, the quotation becomes the
question, the speaker the answer, and the sentences around the context.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from packaged_texts import news, write_rows

_NAME = r"((?:(?:Mr|Mrs|Ms|Dr|Sir|Lord|Lady) )?[A-Z][\w'-]+(?: [A-Z][\w'-]+){0,2})"
_QUOTE = r'"([^"\n]{20,200})"'
_SAID = r"(?:said|says|told|added|explained|insisted|warned)"
_SPOKEN = (
    re.compile(rf"{_QUOTE},? {_SAID} {_NAME}"),
    re.compile(rf"{_QUOTE},? {_NAME} {_SAID}"),
    re.compile(rf"{_NAME} {_SAID}(?: [A-Za-z ]{{0,40}})?: {_QUOTE}"),
)
_NO_NAMES = {"He", "She", "They", "It", "We", "But", "And", "The", "This", "That", "There"}


def questions(number: int, text: str) -> Iterator[dict[str, Any]]:
    lines = text.split("\n")
    for i, line in enumerate(lines):
        for order, pattern in enumerate(_SPOKEN):
            for match in pattern.finditer(line):
                group = 1 if order == 2 else 2
                speaker, quote = match[group], match[3 - group]
                if speaker.split()[0] in _NO_NAMES:
                    continue
                before = "".join(part + " " for part in lines[max(i - 1, 0) : i])
                context = before + line + "".join(" " + part for part in lines[i + 1 : i + 2])
                start = len(before) + match.start(group)
                yield {
                    "id": f"{number}-{i}-{match.start()}",
                    "question": f"Who said: {quote.strip(' ,.')}?",
                    "context": context,
                    "answers": {"text": [speaker], "answer_start": [start]},
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/question_answering_data"))
    options = parser.parse_args()
    write_rows(
        options.folder / "who_said_it.jsonl",
        (row for i, (_, _, text) in enumerate(news()) for row in questions(i, text)),
    )


if __name__ == "__main__":
    main()
