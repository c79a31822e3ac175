"""Writes the table of docs/attention.md from the capabilities of the op.

python tools/attention_table.py            rewrite the page
python tools/attention_table.py --check    exit code 1 when the page is out of date
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "attention.md"
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->"


def updated(page: str) -> str:
    """The page with the table that the code gives now."""
    from lora_kernels.ops.attention import capabilities

    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"{PAGE} lacks the markers {BEGIN.strip()} and {END}")
    return before + BEGIN + capabilities.markdown() + END + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    new = updated(page)
    if new == page:
        return 0
    if not check:
        temporary = PAGE.with_suffix(".tmp")
        temporary.write_text(new, encoding="utf-8")
        os.replace(temporary, PAGE)
    return int(check)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
