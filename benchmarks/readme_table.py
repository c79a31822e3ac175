"""Put the newest results into the README.

    python -m benchmarks.readme_table [--op lora_linear] [--record FILE] [--readme README.md]

fills the region between the benchmark markers and leaves the rest of the file alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.providers import BASELINE, LABELS
from benchmarks.report import MODES, subtitle

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
ROOT = Path(__file__).resolve().parents[1]


def cell(row: dict[str, Any] | None, best: float) -> str:
    if row is None or row["skipped"]:
        return "-"
    text = f"{row['ratio']:.2f}"
    return f"**{text}**" if row["ratio"] == best else text


def tables(result: dict[str, Any]) -> str:
    """One table per dtype and mode: time over the frozen layer, the best of a line in bold."""
    rows = result["rows"]
    timed = {r["provider"] for r in rows if not r["skipped"]}
    names = [p for p in LABELS if p in timed and p != BASELINE]
    lines = [f"Time relative to the frozen layer, lower is better. {subtitle(result)}.", ""]
    for dtype, mode in dict.fromkeys((r["dtype"], r["mode"]) for r in rows):
        here = [r for r in rows if (r["dtype"], r["mode"]) == (dtype, mode)]
        shown = [p for p in names if any(r["provider"] == p and not r["skipped"] for r in here)]
        lines += [
            f"| {dtype}, {MODES[mode]}: M×K×N | frozen, ms | "
            + " | ".join(LABELS[p] for p in shown) + " |",
            "| --- | ---: |" + " ---: |" * len(shown),
        ]  # fmt: skip
        for shape in dict.fromkeys(record.shape_label(r) for r in here):
            by = {r["provider"]: r for r in here if record.shape_label(r) == shape}
            best = min(by[p]["ratio"] for p in shown if p in by and not by[p]["skipped"])
            base = by[BASELINE]
            frozen = "-" if base["skipped"] else f"{base['median_ms']:.2f}"
            cells = " | ".join(cell(by.get(p), best) for p in shown)
            lines.append(f"| {shape} | {frozen} | {cells} |")
        lines.append("")
    peak = result["amx_peak"]["gflops"]
    if peak:
        lines.append(f"AMX bf16 peak of a tile loop in the same run: {peak / 1e3:.2f} TFLOP/s.")
    dirty = " with uncommitted changes" if result["dirty"] else ""
    lines.append(f"Commit {result['commit']}{dirty}. Again: `{result['command']}`")
    return "\n".join(lines)


def fill(text: str, content: str) -> str:
    """`text` with the marked region replaced; ValueError when the markers are not there once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"the file needs one {BEGIN} and, below it, one {END}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_table")
    parser.add_argument("--op", default="lora_linear")
    parser.add_argument("--record", type=Path, help="default: the newest of the op")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(argv)
    try:
        path = options.record or record.newest(options.op)
        content = tables(json.loads(path.read_text()))
        text = fill(options.readme.read_text(), content)
    except (OSError, ValueError) as error:
        print(f"readme_table: {error}", file=sys.stderr)
        return 2
    record.write_atomically(options.readme, text.encode())
    print(f"{options.readme}: filled from {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
