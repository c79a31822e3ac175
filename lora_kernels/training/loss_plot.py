"""The loss curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from lora_kernels.training.result import run_name

_COLORS = {"lora_kernels": "#d9480f", "stock PEFT": "#1864ab"}
_LEGIBLE = 150  # steps; longer curves are drawn as a mean over their noise


def draw_losses(path: Path, report: dict[str, Any]) -> None:
    """Training loss per step and the losses of validations, of both runs where there are two.

    Of a long training a running mean is drawn, and the losses of its steps in pale behind it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = run_name(report)
    curves: list[tuple[str, str, Any]] = [(first, "", "-")]
    if report["losses_stock"] is not None:
        # Dashes on top: where the curves coincide, both stay visible.
        curves.append(("stock PEFT", "_stock", (0, (3, 3))))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, suffix, style in curves:
        color = _COLORS.get(name, _COLORS["lora_kernels"])
        steps, losses = zip(*report["losses" + suffix], strict=True)
        label = f"{name}, training"
        if len(steps) > _LEGIBLE:
            axes.plot(steps, losses, color=color, linewidth=0.7, alpha=0.25)
            losses = tuple(running_mean(losses, len(steps) // 40))
            label += " (running mean)"
        axes.plot(steps, losses, color=color, linestyle=style, linewidth=1.6, label=label)
        points = report["validation_losses" + suffix]
        if points:
            steps, losses = zip(*points, strict=True)
            marker = "o" if suffix == "" else "x"
            size = 8 if len(points) <= 12 else 4
            axes.plot(
                steps, losses, marker, color=color, markersize=size, label=f"{name}, validation"
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy loss")
    axes.set_xlim(left=0)
    low, high = axes.dataLim.y0, axes.dataLim.y1
    if low < 0.5 * high:
        axes.set_ylim(0, 1.05 * high)
    else:  # a loss that falls by a tenth would be a flat line above an empty picture
        axes.margins(y=0.1)
    axes.set_title(f"{report['model']} on {report['dataset']}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and its neighbours up to `window` // 2 away on either side."""
    sums = list(accumulate(values, initial=0.0))
    reach, count = window // 2, len(values)
    spans = [(max(i - reach, 0), min(i + reach + 1, count)) for i in range(count)]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]
