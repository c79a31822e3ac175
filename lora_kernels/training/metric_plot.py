"""The validation metrics of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw_metrics(path: Path, report: dict[str, Any]) -> None:
    """One panel per metric over the optimizer steps, between the scores of the test before and
    after; no file where nothing was validated."""
    curves = {
        name: [(step, value) for step, value in points if value is not None]
        for name, points in report["curves"].items()
        if name != "f1_macro" or report["task"] != "classification"  # there it is f1 once more
    }
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    before, after = report["metrics_before"] or {}, report["metrics"]
    columns = 2 if len(curves) == 4 else min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for position, (name, points) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(rows, columns, position)
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps, values, "o-", color="#d9480f", linewidth=1.6, markersize=5, label="validation"
        )
        tested = [(0, before.get(name)), (report["best_step"] or report["steps"], after.get(name))]
        tested = [(step, value) for step, value in tested if value is not None]
        if tested:
            axes.plot(*zip(*tested, strict=True), "s", color="#495057", fillstyle="none",
                      label="test, before and after")  # fmt: skip
        axes.margins(x=0.06, y=0.12)
        axes.set_title(name + (" *" if name == report["metric"] else ""), fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if position == 1:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
