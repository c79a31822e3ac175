"""ROUGE of the headlines that models write for the test articles.

A model is what `lora-kernels generate` takes. The first line is the same test with the beginning of
the article in place of a model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lora_kernels.training.metrics.generated import ROUGE, generation_scores
from lora_kernels.training.text_generation import Generator, Sampling

LINE = "{:<40}{:>9}{:>9}{:>9}"


def show(name: str, answers: list[str], headlines: list[str]) -> None:
    scores = generation_scores(answers, headlines)
    print(LINE.format(name, *(f"{scores[key]:.1f}" for key in ROUGE)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="runs, adapters, plain models")
    parser.add_argument("--folder", type=Path, default=Path("runs/summarisation_data"))
    parser.add_argument("--limit", type=int, default=20, help="articles to write about")
    options = parser.parse_args()
    text = (options.folder / "test.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()][: options.limit]
    headlines = [row["response"] for row in rows]
    print(LINE.format(f"headlines of {len(rows)} articles", "ROUGE-1", "ROUGE-2", "ROUGE-L"))
    beginnings = [" ".join(row["prompt"].partition("\n\n")[2].split()[:8]) for row in rows]
    show("the article's first eight words", beginnings, headlines)
    for model in options.models:
        trained = Path(model).is_dir()  # a run knows its precision
        generator = Generator(model, dtype=None if trained else "bfloat16")
        sampling = Sampling(max_new_tokens=16)
        answers = [generator(row["prompt"], sampling, chat=True)["text"] for row in rows]
        show(model, answers, headlines)
        print(f"  {headlines[0]!r}: {answers[0].strip()!r}")


if __name__ == "__main__":
    main()
