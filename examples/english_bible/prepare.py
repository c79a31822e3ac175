"""The chapters of the World English Bible as jsonl, footnotes left out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from packaged_texts import chapters, write_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/english_bible_data"))
    options = parser.parse_args()
    write_rows(options.folder / "chapters.jsonl", ({"text": text} for text in chapters()))


if __name__ == "__main__":
    main()
