"""English dialogues of the package chatterbot-corpus as chat messages."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from packaged_texts import dialogues, write_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/dialogues_data"))
    options = parser.parse_args()
    roles = ("user", "assistant")
    write_rows(
        options.folder / "dialogues.jsonl",
        (
            {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}
            for texts in dialogues()
        ),
    )


if __name__ == "__main__":
    main()
