"""Japanese and English verses of the Bible side by side, and a small T5 with random weights.

The Old Testament is one domain, the New Testament the other: another translation into Japanese.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from packaged_texts import english_verses, japanese_verses, write_rows
from small_t5 import write_small_t5

OLD_TESTAMENT = 39


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/t5_translation_data"))
    parser.add_argument("--limit", type=int, help="use about this many verses, evenly")
    parser.add_argument("--vocabulary", type=int, default=6000)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=3)
    options = parser.parse_args()
    english, japanese = english_verses(), japanese_verses()
    pairs = {place: (japanese[place], text) for place, text in english.items() if place in japanese}
    if options.limit is not None:
        places = list(pairs)[:: max(len(pairs) // options.limit, 1)]
        pairs = {place: pairs[place] for place in places}
    for name, old in (("old", True), ("new", False)):
        write_rows(
            options.folder / f"{name}.jsonl",
            (
                {"japanese": source, "english": target}
                for (book, _, _), (source, target) in pairs.items()
                if (book <= OLD_TESTAMENT) == old
            ),
        )
    texts = [text for pair in list(pairs.values())[:: 1 if options.limit else 4] for text in pair]
    write_small_t5(
        options.folder / "model", texts, options.vocabulary, options.width, options.layers
    )


if __name__ == "__main__":
    main()
