"""Put the newest results into the README.

    python -m benchmarks.readme_table [--op lora_linear] [--record FILE] [--readme README.md]
    python -m benchmarks.readme_table --device cuda

fills the region between the benchmark markers (of the CPU, or of GPUs) and leaves the rest of the
file alone. Without a record of gpu-check the region of GPUs says that there is none.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import gpu_report, record
from benchmarks.providers import BASELINE, LABELS
from benchmarks.report import MODES, commit_line, subtitle

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
GPU_BEGIN, GPU_END = "<!-- gpu-benchmark:begin -->", "<!-- gpu-benchmark:end -->"
NO_GPU_RESULTS = (
    "No GPU results are recorded yet: the GPU kernels were compiled, emulated and interpreted, but "
    "have not run on a GPU. `auto` therefore uses `aten` there."
)
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
    lines.append(commit_line(result))
    return "\n".join(lines)


def gpu_tables(path: Path | None) -> tuple[str, str]:
    """(content, where it comes from): of the record, else of the newest one of each device."""
    paths = [path] if path else newest_per_device()
    results = [json.loads(p.read_text()) for p in paths]
    # A kernel that failed its checks has no place in a table.
    parts = []
    for result in results:
        verdicts = result["kernels"]
        rows = [
            r
            for r in result["rows"]
            if (k := verdicts.get(r["op"], {}).get(r["provider"].removesuffix("-fp32"))) is None
            or k["verdict"] == "passed"
        ]
        if any(not r["skipped"] for r in rows):
            parts.append(gpu_report.readme({**result, "rows": rows}))
    if not parts:
        return NO_GPU_RESULTS, "no record"
    return "\n\n".join(parts), ", ".join(str(p) for p in paths)


def newest_per_device() -> list[Path]:
    """Of the records of gpu-check."""
    newest: dict[str, tuple[str, Path]] = {}
    for path in sorted(record.RESULTS.rglob("*.json")):
        result = json.loads(path.read_text())
        if result.get("op") == "gpu_check":
            name = result["device"]["name"]
            newest[name] = max(newest.get(name, ("", path)), (result["date"], path))
    return [path for _, path in newest.values()]


def fill(text: str, content: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with the marked region replaced; ValueError when the markers are not there once."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"the file needs one {begin} and, below it, one {end}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def fill_page(
    page: Path, path: Path, render: Callable[[dict[str, Any]], str], begin: str, end: str
) -> None:
    """Put the record at `path` between the markers of a page; OSError, ValueError as of `fill`."""
    text = fill(page.read_text(), render(json.loads(path.read_text())), begin, end)
    record.write_atomically(page, text.encode())
    print(f"{page} from {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_table")
    parser.add_argument("--op", default="lora_linear")
    parser.add_argument("--record", type=Path, help="default: the newest of the op")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args(argv)
    try:
        if options.device == "cuda":
            content, source = gpu_tables(options.record)
            text = fill(options.readme.read_text(), content, GPU_BEGIN, GPU_END)
        else:
            path = options.record or record.newest(options.op)
            content, source = tables(json.loads(path.read_text())), str(path)
            text = fill(options.readme.read_text(), content)
    except KeyError as error:
        print(f"readme_table: {error.args[0]} is missing in the record", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"readme_table: {error}", file=sys.stderr)
        return 2
    record.write_atomically(options.readme, text.encode())
    print(f"{options.readme}: filled from {source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
