"""Which classes a model takes for which, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_NUMBERS_UP_TO = 20  # classes; beyond, the colours have to do


def draw_confusion(path: Path, confusion: dict[str, Any]) -> None:
    """Counts per true class (rows) and predicted class; colours are shares of the row.

    Args:
        confusion: ``labels`` in order, and ``counts``, a row per true class.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels, counts = confusion["labels"], confusion["counts"]
    shares = [[c / max(1, sum(row)) for c in row] for row in counts]
    size = max(4.0, min(14.0, 1.6 + 0.55 * len(labels)))
    figure = Figure(figsize=(size + 1.0, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Oranges", vmin=0.0, vmax=1.0)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    right, total = sum(row[i] for i, row in enumerate(counts)), sum(map(sum, counts))
    axes.set_title(f"test: {right} of {total} right", fontsize=10)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(labels) <= _NUMBERS_UP_TO:
        for i, row in enumerate(counts):
            for j, count in enumerate(row):
                color = "white" if shares[i][j] > 0.6 else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=color, fontsize=9)
    figure.savefig(path, dpi=150)
