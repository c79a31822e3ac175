"""`lora-kernels predict RUN TEXT ...`."""

from __future__ import annotations

import argparse
import json
import sys

from lora_kernels.errors import DataError

NAME = "predict"
SUMMARY = "classify texts with a finished run"
DESCRIPTION = "Prints the class of each text and the probability that the model gives it."
EXAMPLES = """\
examples:
  lora-kernels predict runs/demo "The striker scored twice in the final minutes."
  lora-kernels predict runs/demo --json "Shares fell sharply." "A new phone was shown."
  cut -f 2 messages.tsv | lora-kernels predict runs/demo -"""

_SHOWN = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="a folder written by lora-kernels train")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="a text; - reads lines of stdin")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per text, with all probabilities"
    )


def run(arguments: argparse.Namespace) -> int:
    texts = []
    for text in arguments.texts:
        texts += [line.rstrip("\r\n") for line in sys.stdin] if text == "-" else [text]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError("no text to classify: TEXT is empty; accepted: at least one with letters")

    from lora_kernels.training import Predictor

    answers = Predictor(arguments.folder)(texts)
    if arguments.json:
        for text, answer in zip(texts, answers, strict=True):
            print(json.dumps({"text": text, **answer}, ensure_ascii=False))
        return 0
    width = max(len(answer["label"]) for answer in answers)
    for text, answer in zip(texts, answers, strict=True):
        line = f"{answer['label']:<{width}}  {answer['probability']:.3f}"
        if len(texts) > 1:
            words = " ".join(text.split())
            line += "  " + (words if len(words) <= _SHOWN else words[: _SHOWN - 3] + "...")
        print(line)
    return 0
