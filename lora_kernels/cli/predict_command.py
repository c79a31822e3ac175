"""`lora-kernels predict RUN TEXT ...`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lora_kernels.errors import DataError

NAME = "predict"
SUMMARY = "ask a finished run"
DESCRIPTION = """\
Answers with a run of lora-kernels train, as its task has it: the class of a
text and its probability, a continuation, the likeliest words for each mask
token, a translation or summary, the answer to a question about --context, or
the labels of the words."""
EXAMPLES = """\
examples:
  lora-kernels predict runs/demo "The striker scored twice."
  lora-kernels predict runs/demo --json "Shares fell." "A phone was shown."
  cut -f 2 messages.tsv | lora-kernels predict runs/demo -
  lora-kernels predict runs/qa "Who won?" --context @report.txt"""

_SHOWN = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="a folder written by lora-kernels train")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="a text; - reads lines of stdin")
    parser.add_argument(
        "--context", metavar="TEXT", help="what a question is about; @FILE reads a file"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per text, with everything known"
    )


def run(arguments: argparse.Namespace) -> int:
    texts = []
    for text in arguments.texts:
        texts += [line.rstrip("\r\n") for line in sys.stdin] if text == "-" else [text]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError("no text to ask about: TEXT is empty; accepted: at least one with letters")
    context = _context(arguments.context)

    from lora_kernels.training import Predictor

    predictor = Predictor(arguments.folder)
    answers = predictor([predictor.task.read_input(text, context) for text in texts])
    for text, answer in zip(texts, answers, strict=True):
        if arguments.json:
            print(json.dumps({"text": text, **answer}, ensure_ascii=False))
            continue
        line = predictor.task.show(answer)
        if len(texts) > 1:
            words = " ".join(text.split())
            line += "  " + (words if len(words) <= _SHOWN else words[: _SHOWN - 3] + "...")
        print(line)
    return 0


def _context(given: str | None) -> str | None:
    """The text itself, or that of the file behind ``@``.

    Raises:
        DataError: no such file, not UTF-8, or nothing in it.
    """
    if given is None:
        return None
    text = given
    if given.startswith("@"):
        try:
            text = Path(given[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as e:
            raise DataError(f"--context {given}: {given[1:]} cannot be read: {e}") from None
    if not text.strip():
        raise DataError("--context is empty; accepted: a text, or @FILE")
    return text
