"""Put the newest records of blocks, grouping and peak memory into docs/blocks.md.

    python -m benchmarks.blocks_table [--page docs/blocks.md]

fills the regions between the markers and leaves the rest of the page alone. A region whose records
are missing is left as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.readme_table import fill
from benchmarks.report import machine_line

PAGE = Path(__file__).resolve().parents[1] / "docs" / "blocks.md"
_MODULES = {"qkv": "LoRAQKV", "mlp": "LoRAMLP"}
_SHORT = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": "gate", "up_proj": "up"}
_DTYPES = ("bf16", "fp32")
_Records = list[dict[str, Any]]


def newest(op: str) -> _Records:
    """Of the records of `op`, the latest for each dtype (and block)."""
    latest: dict[tuple[int, int], dict[str, Any]] = {}
    for path in sorted(record.RESULTS.rglob("*.json")):
        result = json.loads(path.read_text())
        if result.get("op") == op:
            key = (_DTYPES.index(result["dtype"]), list(_MODULES).index(result.get("block", "qkv")))
            if key not in latest or latest[key]["date"] <= result["date"]:
                latest[key] = result
    return [latest[key] for key in sorted(latest)]


def _sources(results: _Records) -> str:
    """Machine, commits and what to type to measure again."""
    commits = dict.fromkeys(
        r["commit"] + (" with uncommitted changes" if r["dirty"] else "") for r in results
    )
    commands = "\n".join(f"    {r['command']}" for r in results)
    return f"{machine_line(results[0])}. Commit {', '.join(commits)}. Again:\n\n{commands}"


def _ratio(row: dict[str, Any]) -> str:
    low, high = row["ratio_iqr"]
    return f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def blocks(results: _Records) -> str:
    """Time over PEFT's in the same round."""
    lines = []
    for r in results:
        lines += [
            f"| {_MODULES[r['block']]}, {r['dtype']} | forward and backward, ms | over PEFT |",
            "|---|---:|---:|",
        ]
        lines += [
            f"| {row['provider']} | {1e3 * row['seconds']:.2f} | {_ratio(row)} |"
            for row in r["rows"]
        ]
        lines.append("")
    r = results[0]
    head = (
        f"SmolLM2-135M's widths, {r['M']} rows, rank {r['rank']}, dropout {r['dropout']:g}; "
        f"median\n[quartiles] of {r['rounds']} interleaved rounds, lower is better."
    )
    return "\n".join([head, "", *lines, _sources(results)])


def grouping(results: _Records) -> str:
    """Time together over time one by one in the same round."""
    shown = [(row["M"], row["mode"]) for row in results[0]["rows"]]
    columns = list(dict.fromkeys(shown))
    titles = [f"{m}, {'training' if mode == 'fwdbwd' else 'forward'}" for m, mode in columns]
    lines = [
        "| adapted; rows: | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles),
    ]  # fmt: skip
    for r in results:
        for block, adapted in dict.fromkeys((w["block"], tuple(w["adapted"])) for w in r["rows"]):
            by = {
                (w["M"], w["mode"]): w for w in r["rows"]
                if (w["block"], tuple(w["adapted"])) == (block, adapted)
            }  # fmt: skip
            names = ", ".join(_SHORT[name] for name in adapted)
            names += " (k frozen)" if adapted == ("q_proj", "v_proj") else ""
            cells = " | ".join(f"{by[c]['ratio']:.2f}" for c in columns)
            lines.append(f"| {names}, {r['dtype']} | {cells} |")
    r = results[0]
    head = (
        "Time together over time of each layer by itself\n"
        "(`LORA_KERNELS_DISABLE=grouped_lora_linear`), SmolLM2-135M's widths, rank "
        f"{r['rank']}, median of {r['rounds']} interleaved rounds."
    )
    return "\n".join([head, "", *lines, "", _sources(results)])


def memory(results: _Records) -> str:
    """Peak of the resident set above the libraries', and over PEFT's."""
    names = [row["provider"] for row in results[0]["rows"]]
    lines = [
        "| | " + " | ".join(f"{r['dtype']}, MiB | over PEFT" for r in results) + " |",
        "|---|" + "---:|---:|" * len(results),
    ]
    for i, name in enumerate(names):
        cells = []
        for r in results:
            n, first = (r["rows"][j]["above_libraries_bytes"] for j in (i, 0))
            cells += [f"{n / 2**20:.0f}", f"{n / first:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    r = results[0]
    head = (
        f"{r['layers']} layers of SmolLM2-135M's shape with head and loss, {r['batch']} x "
        f"{r['sequence']} tokens, all linears, rank {r['rank']}, dropout {r['dropout']:g};\na "
        "process for each line, peak of the resident set in two steps after one to warm up, less\n"
        "what it was before the model was built."
    )
    return "\n".join([head, "", *lines, "", _sources(results)])


REGIONS: dict[str, Callable[[_Records], str]] = {
    "blocks": blocks, "grouping": grouping, "peak_memory": memory,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocks_table")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    try:
        text = options.page.read_text()
        for op, render in REGIONS.items():
            results = newest(op)
            if results:
                marks = f"<!-- {op}-benchmark:begin -->", f"<!-- {op}-benchmark:end -->"
                text = fill(text, render(results), *marks)
    except (OSError, ValueError) as error:
        print(f"blocks_table: {error}", file=sys.stderr)
        return 1
    record.write_atomically(options.page, text.encode())
    print(f"{options.page}: filled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
