"""BBC articles as requests for a headline: what to train on, and what to test with."""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from packaged_texts import news, write_rows

WORDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/summarisation_data"))
    parser.add_argument("--train", type=int, default=300, help="articles to train on")
    parser.add_argument("--test", type=int, default=40, help="articles to test with")
    options = parser.parse_args()
    rows = [
        {
            "prompt": "Write a headline for this article.\n\n" + " ".join(text.split()[:WORDS]),
            "response": headline,
        }
        for _, headline, text in news()
    ]
    random.Random(0).shuffle(rows)
    write_rows(options.folder / "test.jsonl", rows[: options.test])
    write_rows(options.folder / "train.jsonl", rows[options.test :][: options.train])


if __name__ == "__main__":
    main()
