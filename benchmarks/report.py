"""The table on the terminal and the chart."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from benchmarks.providers import BASELINE, LABELS
from benchmarks.record import shape_label, write_atomically

MODES = {"fwd": "forward", "fwdbwd": "forward + backward"}
COLORS = {
    "peft": "#c9ced6", "peft-fp32": "#9aa3b0", "peft-compile": "#6b7686",
    "reference": "#e8d5b5", "aten": "#e0a458", "aten-fp32": "#edc893",
    "cpu": "#1f6feb", "cpu-fp32": "#7fb0f7", "aten-padded": "#c98a2b",
    "triton": "#2da44e", "triton-fp32": "#84cf98", "cuda": "#1f6feb", "cuda-fp32": "#7fb0f7",
    "unsloth": "#b083c9", "lorafusion": "#8b5fa8", "liger": "#d3b8e0",
}  # fmt: skip
HEADER = (
    f"{'M×K×N':>16}  {'dtype':8} {'mode':7} {'provider':14} {'median ms':>10} {'IQR':>13} "
    f"{'ratio':>6} {'IQR':>11} {'peak':>5} {'peak MB':>8} {'saved MB':>8}"
)


def line(row: dict[str, Any]) -> str:
    """One row of the table; a provider that was not timed says why."""
    head = f"{shape_label(row):>16}  {row['dtype']:8} {row['mode']:7} {row['provider']:14}"
    if row["skipped"]:
        return f"{head} not timed: {row['skipped']}"
    low, high = row["iqr_ms"]
    peak = "n/a" if row["peak_share"] is None else f"{row['peak_share']:.2f}"
    memory = [
        "n/a" if row[key] is None else f"{row[key] / 1e6:.1f}"
        for key in ("peak_bytes", "saved_bytes")
    ]
    return (
        f"{head} {row['median_ms']:10.3f} {low:6.2f}-{high:<6.2f} {row['ratio']:6.2f} "
        f"{row['ratio_iqr'][0]:5.2f}-{row['ratio_iqr'][1]:<5.2f} {peak:>5} "
        f"{memory[0]:>8} {memory[1]:>8}"
    )


def machine_line(record: dict[str, Any]) -> str:
    device = record["device"]
    isa = device["isa"][0].replace("_", "-").upper() if device["isa"] else device["capability"]
    return f"{device['name']} ({isa}, {device['threads']} threads), torch {record['torch']}"


def commit_line(record: dict[str, Any]) -> str:
    """Which sources a table speaks of, and what to type to measure them again."""
    dirty = " with uncommitted changes" if record["dirty"] else ""
    return f"Commit {record['commit']}{dirty}. Again: `{record['command']}`"


def subtitle(record: dict[str, Any]) -> str:
    return (
        f"{machine_line(record)}, rank {record['rank']}, dropout {record['dropout']:g}; median of "
        f"{record['rounds']} interleaved rounds"
    )


def _panel(axes: Any, rows: list[dict[str, Any]], title: str) -> None:
    shapes = list(dict.fromkeys(shape_label(r) for r in rows))
    names = [p for p in LABELS if any(r["provider"] == p for r in rows) and p != BASELINE]
    width = 0.82 / max(len(names), 1)
    top = 1.0
    for position, name in enumerate(names):
        for row in (r for r in rows if r["provider"] == name):
            x = shapes.index(shape_label(row)) + (position - (len(names) - 1) / 2) * width
            low, high = row["ratio_iqr"]
            axes.bar(x, row["ratio"], width * 0.92, color=COLORS[name], zorder=2)
            axes.plot([x, x], [low, high], color="#30363d", linewidth=0.9, zorder=3)
            axes.annotate(
                f"{row['ratio']:.2f}", (x, high), (0, 2), textcoords="offset points",
                ha="center", va="bottom", fontsize=6.5, color="#30363d",
            )  # fmt: skip
            top = max(top, high)
    axes.axhline(1.0, color="#30363d", linewidth=0.9, linestyle=(0, (4, 3)), zorder=2.5)
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xticks(range(len(shapes)), shapes, fontsize=8)
    axes.set_ylim(0, top * 1.1)
    axes.set_xlim(-0.55, len(shapes) - 0.45)
    axes.set_ylabel("time / frozen layer", fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#d8dee4", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def chart(record: dict[str, Any], path: Path) -> None:
    """Ratio to the frozen layer, one panel per dtype and mode, lower is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    timed = [r for r in record["rows"] if not r["skipped"]]
    panels = list(dict.fromkeys((r["dtype"], r["mode"]) for r in timed))
    names = [p for p in LABELS if p in {r["provider"] for r in timed} and p != BASELINE]
    shapes = len({shape_label(r) for r in timed})
    width = max(8.0, 1.1 + 0.26 * shapes * len(names))
    columns = max(1, int(width / 2.2))
    header = 0.42 + 0.19 * -(-(len(names) + 1) // columns)  # title, subtitle, legend rows; inches
    size = (width, header + 2.5 * len(panels))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=size, squeeze=False)
    for ax, (dtype, mode) in zip(axes[:, 0], panels, strict=True):
        rows = [r for r in timed if (r["dtype"], r["mode"]) == (dtype, mode)]
        _panel(ax, rows, f"{dtype}, {MODES[mode]}")
    axes[-1, 0].set_xlabel("M×K×N of the layer (rows × in × out features)", fontsize=8)
    inch = 1.0 / size[1]
    figure.suptitle(
        f"{record['op']}: cost of a LoRA layer relative to the frozen one (lower is better)",
        x=0.01, y=1 - 0.08 * inch, ha="left", va="top", fontsize=12, fontweight="bold",
    )  # fmt: skip
    figure.text(
        0.01,
        1 - 0.36 * inch,
        f"{subtitle(record)}; lines: quartiles",
        ha="left",
        va="top",
        fontsize=7.5,
        color="#57606a",
    )
    handles = [Patch(color=COLORS[name], label=LABELS[name]) for name in names]
    handles.append(
        pyplot.Line2D([], [], color="#30363d", linestyle=(0, (4, 3)), label=LABELS[BASELINE])
    )
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.005, 1 - 0.5 * inch),
        ncols=columns, frameon=False, fontsize=8, handlelength=1.4, columnspacing=1.4,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 1 - header * inch), h_pad=1.2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    pyplot.close(figure)
    write_atomically(path, buffer.getvalue())
