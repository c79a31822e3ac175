"""Tables of a GPU record: for the terminal and for the README."""

from __future__ import annotations

from typing import Any

from benchmarks.providers import BASELINE, LABELS

MODES = {"fwd": "forward", "bwd": "backward", "fwdbwd": "forward + backward"}
HEADER = (
    f"{'M×K×N':>22} {'r':>4} {'drop':>5} {'dtype':8} {'mode':7} {'provider':13} {'ms':>8} "
    f"{'ratio':>6} {'IQR':>11} {'TFLOP/s':>8} {'GB/s':>6} {'gemm':>5} {'copy':>5} "
    f"{'launch':>6} {'peak MB':>8}"
)


def label(row: dict[str, Any]) -> str:
    m, k, _ = row["shape"]
    return f"{m}×{k}×{'+'.join(str(n) for n in row['members'])}"


def case_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one problem from another; the mode is not part of it."""
    return (*row["shape"], tuple(row["members"]), row["rank"], row["dropout"], row["dtype"])


def line(row: dict[str, Any]) -> str:
    """One row of the table; a provider that was not timed says why."""
    head = (
        f"{label(row):>22} {row['rank']:4} {row['dropout']:5g} {row['dtype']:8} {row['mode']:7} "
        f"{row['provider']:13}"
    )
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
    for name, kernel in record.get("kernels", {}).items():
        why = f" ({'; '.join(kernel['why'])})" if kernel["why"] else ""
        lines.append(f"kernels of {name}: {kernel['verdict']}{why}")
    return "\n".join(lines)


def readme(record: dict[str, Any]) -> str:
    """Markdown: one table per mode, time over the frozen layer, the best of a line in bold."""
    timed = [r for r in record["rows"] if not r["skipped"]]
    names = [p for p in LABELS if p != BASELINE and any(r["provider"] == p for r in timed)]
    lines = [f"Time relative to the frozen layer, lower is better. {subtitle(record)}.", ""]
    for mode in dict.fromkeys(r["mode"] for r in timed):
        here = [r for r in timed if r["mode"] == mode]
        shown = [p for p in names if any(r["provider"] == p for r in here)]
        lines += [
            f"| {MODES[mode]}: M×K×N | rank | dropout | dtype | frozen, ms | "
            + " | ".join(LABELS[p] for p in shown) + " |",
            "| --- | ---: | ---: | --- | ---: |" + " ---: |" * len(shown),
        ]  # fmt: skip
        for case in dict.fromkeys(case_of(r) for r in here):
            by = {r["provider"]: r for r in here if case_of(r) == case}
            ratios = [by[p]["ratio"] for p in shown if p in by]
            if BASELINE not in by or not ratios:
                continue
            base = by[BASELINE]
            cells = []
            for p in shown:
                text = f"{by[p]['ratio']:.2f}" if p in by else "-"
                cells.append(f"**{text}**" if p in by and by[p]["ratio"] == min(ratios) else text)
            lines.append(
                f"| {label(base)} | {base['rank']} | {base['dropout']:g} | {base['dtype']} | "
                f"{base['median_ms']:.3f} | " + " | ".join(cells) + " |"
            )
        lines.append("")
    top = record["ceilings"]
    lines.append(
        f"Ceilings of the same run: a large copy {top['copy_gb_s']:.0f} GB/s, a large bf16 product "
        f"{top['gemm_tflops']:.0f} TFLOP/s. Commit {record['commit'] or 'unknown'}. "
        f"Again: `make gpu-check`"
    )
    return "\n".join(lines)
