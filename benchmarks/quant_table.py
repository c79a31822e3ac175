"""Put the newest CPU times of quantized weights into docs/quantization.md.

    python -m benchmarks.quant_table [--record FILE] [--page docs/quantization.md]

fills the region between the markers and leaves the rest of the page alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.readme_table import fill_page
from benchmarks.report import commit_line, machine_line

BEGIN, END = "<!-- quant-benchmark:begin -->", "<!-- quant-benchmark:end -->"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "quantization.md"
BANDWIDTH = {
    "gemv": "{rows}, {k} inputs, {n} outputs",
    "dequantize": "Dequantize {n} x {k} to bf16",
}


def _us(row: dict[str, Any]) -> str:
    low, high = row["iqr_us"]
    return f"{row['median_us']:.0f} [{low:.0f}, {high:.0f}]"


def _bandwidth(table: str, shape: tuple[int, ...], rows: list[dict[str, Any]]) -> list[str]:
    m, k, n = shape if table == "gemv" else (0, shape[1], shape[0])
    title = BANDWIDTH[table].format(rows="One row" if m == 1 else f"{m} rows", n=n, k=k)
    lines = [
        f"| {title} | time, us | GB/s | share of a copy's |",
        "|---|---:|---:|---:|",
    ]
    return lines + [
        f"| {r['provider']} | {_us(r)} | {r['gbytes_per_s']:.1f} | {100 * r['of_copy']:.0f} % |"
        for r in rows
    ]


def _training(rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(r["provider"] for r in rows))
    lines = [
        "| with a LoRA adapter, over lora_kernels bf16: M x K x N | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for key in dict.fromkeys((r["table"], tuple(r["shape"])) for r in rows):
        by = {r["provider"]: r for r in rows if (r["table"], tuple(r["shape"])) == key}
        label = f"{key[0]}, {' x '.join(map(str, key[1]))}"
        lines.append(f"| {label} | " + " | ".join(f"{by[n]['ratio']:.2f}" for n in names) + " |")
    return lines


def render(result: dict[str, Any]) -> str:
    """The tables of one record of benchmarks.quant_linear_cpu."""
    rows = result["rows"]
    lines = [
        f"{machine_line(result)}, bitsandbytes {result['bitsandbytes']}, torchao "
        f"{result['torchao']}; median [quartiles] of {result['rounds']} interleaved rounds. "
        "Weights take turns, three copies of each.",
    ]  # fmt: skip
    for table in BANDWIDTH:
        for shape in dict.fromkeys(tuple(r["shape"]) for r in rows if r["table"] == table):
            here = [r for r in rows if r["table"] == table and tuple(r["shape"]) == shape]
            lines += ["", *_bandwidth(table, shape, here)]
    lines += ["", *_training([r for r in rows if r["table"] not in BANDWIDTH])]
    lines += ["", commit_line(result)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quant_table")
    parser.add_argument("--record", type=Path, help="default: the newest of quant_linear")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    try:
        path = options.record or record.newest("quant_linear")
        fill_page(options.page, path, render, BEGIN, END)
    except (OSError, ValueError) as error:
        print(f"quant_table: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
