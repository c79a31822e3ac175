"""Tables of a GPU record: for the terminal and for the README."""

from __future__ import annotations

from typing import Any

from benchmarks.providers import BASELINE, LABELS

MODES = {"fwd": "forward", "bwd": "backward", "fwdbwd": "forward + backward"}
# What an op's times are compared with.
BASELINES = {"lora_linear": BASELINE}
FLOOR = "aten"
HEADER = (
    f"{'op':12} {'case':>44} {'mode':7} {'provider':14} {'ms':>8} "
    f"{'ratio':>6} {'IQR':>11} {'TFLOP/s':>8} {'GB/s':>6} {'gemm':>5} {'copy':>5} "
    f"{'launch':>6} {'peak MB':>8}"
)


def baseline(op: str) -> str:
    """The provider that the ratios of an op's rows are ratios to."""
    return BASELINES.get(op, FLOOR)


def case_of(row: dict[str, Any]) -> tuple[str, str]:
    """What tells one problem from another; the mode is not part of it."""
    return row["op"], row["case"]


def line(row: dict[str, Any]) -> str:
    """One row of the table; a provider that was not timed says why."""
    head = f"{row['op'][:12]:12} {row['case']:>44} {row['mode']:7} {row['provider']:14}"
    if row["skipped"]:
        return f"{head} not timed: {row['skipped']}"
    low, high = row["ratio_iqr"]
    count = "n/a" if row["launches"] is None else row["launches"]
    peak = "n/a" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}"
    return (
        f"{head} {row['median_ms']:8.3f} {row['ratio']:6.3f} {low:5.2f}-{high:<5.2f} "
        f"{row['tflops']:8.1f} {row['gb_s']:6.0f} {row['gemm_share']:5.2f} "
        f"{row['copy_share']:5.2f} {count:>6} {peak:>8}"
    )


def subtitle(record: dict[str, Any]) -> str:
    device = record["device"]
    versions = f"torch {record['torch']}"
    if record.get("triton"):
        versions += f", triton {record['triton']}"
    return f"{device['name']} ({device['architecture']}), {versions}"


def table(record: dict[str, Any]) -> str:
    """What the terminal shows: ceilings, every row, and the verdicts."""
    lines = [subtitle(record)]
    top = record.get("ceilings")
    if top:
        lines.append(
            f"ceilings in this run: copy {top['copy_gb_s']:.0f} GB/s, "
            f"bf16 product {top['gemm_tflops']:.0f} TFLOP/s"
        )
    rows = record.get("rows", [])
    if rows:
        lines += [HEADER, *(line(r) for r in rows)]
    for name, part in record.get("parts", {}).items():
        lines.append(f"{name}: {part['status']}" + (f" ({part['why']})" if part["why"] else ""))
    for op, kernels in record.get("kernels", {}).items():
        for name, kernel in kernels.items():
            why = f" ({'; '.join(kernel['why'])})" if kernel["why"] else ""
            lines.append(f"{op}, {name}: {kernel['verdict']}{why}")
    return "\n".join(lines)


def readme(record: dict[str, Any]) -> str:
    """Markdown: a table per op and mode, the best of a line in bold."""
    timed = [r for r in record["rows"] if not r["skipped"]]
    lines = [subtitle(record) + ".", ""]
    for op in dict.fromkeys(r["op"] for r in timed):
        lines += _op_tables(op, [r for r in timed if r["op"] == op])
    top = record["ceilings"]
    lines.append(
        f"Ceilings of the same run: a large copy {top['copy_gb_s']:.0f} GB/s, a large bf16 product "
        f"{top['gemm_tflops']:.0f} TFLOP/s. Commit {record['commit'] or 'unknown'}. "
        f"Again: `make gpu-check`"
    )
    return "\n".join(lines)


def _op_tables(op: str, timed: list[dict[str, Any]]) -> list[str]:
    base = baseline(op)
    against = "the frozen layer" if base == BASELINE else f"`{base}`"
    lines = [f"`{op}`: time relative to {against}, lower is better.", ""]
    order = {name: place for place, name in enumerate(LABELS)}
    names = sorted(
        dict.fromkeys(r["provider"] for r in timed if r["provider"] != base),
        key=lambda name: order.get(name, len(order)),
    )
    for mode in dict.fromkeys(r["mode"] for r in timed):
        here = [r for r in timed if r["mode"] == mode]
        shown = [p for p in names if any(r["provider"] == p for r in here)]
        titles = " | ".join(LABELS.get(p, p) for p in shown)
        lines += [
            f"| {MODES[mode]} | {base}, ms | {titles} |",
            "| --- | ---: |" + " ---: |" * len(shown),
        ]
        for case in dict.fromkeys(case_of(r) for r in here):
            by = {r["provider"]: r for r in here if case_of(r) == case}
            ratios = [by[p]["ratio"] for p in shown if p in by]
            if base not in by or not ratios:
                continue
            cells = []
            for p in shown:
                text = f"{by[p]['ratio']:.2f}" if p in by else "-"
                cells.append(f"**{text}**" if p in by and by[p]["ratio"] == min(ratios) else text)
            lines.append(f"| {case[1]} | {by[base]['median_ms']:.3f} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines
