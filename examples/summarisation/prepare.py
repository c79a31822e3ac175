"""BBC articles with their headlines, and a small T5 with random weights.

Sports is one domain, the other four subjects are the other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from packaged_texts import news, write_rows
from small_t5 import write_small_t5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/summarisation_data"))
    parser.add_argument("--limit", type=int, help="use about this many articles, evenly")
    parser.add_argument("--vocabulary", type=int, default=5000)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    articles = news()
    if options.limit is not None:
        articles = articles[:: max(len(articles) // options.limit, 1)]
    for name, sports in (("other", False), ("sports", True)):
        write_rows(
            options.folder / f"{name}.jsonl",
            (
                {"article": " ".join(text.split()), "headline": headline}
                for subject, headline, text in articles
                if (subject == "sports") == sports
            ),
        )
    texts = [text for _, headline, text in articles for text in (headline, text)]
    write_small_t5(
        options.folder / "model", texts, options.vocabulary, options.width, options.layers
    )


if __name__ == "__main__":
    main()
