"""The loss curves of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kernels.training.result import run_name

_COLORS = {"lora_kernels": "#d9480f", "stock PEFT": "#1864ab"}


def draw_losses(path: Path, report: dict[str, Any]) -> None:
    """Training loss per step and validation loss per epoch, of both runs where there are two."""
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
        axes.plot(
            steps, losses, color=color, linestyle=style, linewidth=1.6, label=f"{name}, training"
        )
        points = report["validation_losses" + suffix]
        if points:
            steps, losses = zip(*points, strict=True)
            marker = "o" if suffix == "" else "x"
            axes.plot(steps, losses, marker, color=color, markersize=8, label=f"{name}, validation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy loss")
    axes.set_ylim(0, 1.05 * axes.dataLim.y1)
    axes.set_title(f"{report['model']} on {report['dataset']}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
