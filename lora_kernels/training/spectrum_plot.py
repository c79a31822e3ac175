"""A picture of what an adapter learnt: how strong its updates are, in how many directions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_kernels.training.adapter_inspection import Inspection

_SHOWN_ROWS = 24
_NUMBERED = 16
_LINES = 60  # curves that can be told apart


def _grid(names: list[str]) -> tuple[list[str], list[int], list[tuple[int, int]]]:
    """Rows (kinds of layer), columns (numbers of blocks) and the place of each name among them.

    The first number in a name is its block, the rest its kind. Without numbers there is one column.
    """
    parsed = []
    for name in names:
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        if found:
            before, after = name[: found.start()], name[found.end() :]
            parsed.append((after or before, int(found.group(1))))
        else:
            parsed.append((name, 0))
    rows = list(dict.fromkeys(kind for kind, _ in parsed))
    columns = sorted({block for _, block in parsed})
    places = [(rows.index(kind), columns.index(block)) for kind, block in parsed]
    return rows, columns, places


def draw_spectra(path: Path, inspection: Inspection) -> None:
    """Two maps over block and kind of layer, and the singular values of every layer."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = inspection.layers
    rows, columns, places = _grid([s.layer for s in layers])
    shares = all(s.share is not None for s in layers)
    strength: Any = np.full((len(rows), len(columns)), np.nan)
    ranks: Any = np.full((len(rows), len(columns)), np.nan)
    for s, place in zip(layers, places, strict=True):
        strength[place] = 100.0 * s.share if shares and s.share is not None else s.norm
        ranks[place] = s.effective_rank
    height = 1.6 + 0.26 * min(len(rows), _SHOWN_ROWS)
    figure = Figure(figsize=(11, 2 * height + 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    upper, middle, lower = figure.subplots(3, 1, height_ratios=[height, height, 3.2])
    label = "update / weight (%)" if shares else "norm of the update"
    _map(upper, strength, rows, columns, "magma", label)
    upper.set_title(f"{inspection.adapter}: strength of each layer's update", fontsize=10)
    _map(middle, ranks, rows, columns, "viridis", f"effective rank (r = {inspection.r})")
    middle.set_title("number of directions that it uses", fontsize=10)
    middle.set_xlabel("block")
    named = _spectra(lower, layers, [row for row, _ in places], rows)
    lower.set_title("singular values, as part of the layer's largest", fontsize=10)
    lower.set_xlabel("number of the singular value")
    lower.set_ylim(0, 1.03)
    lower.grid(alpha=0.25)
    lower.spines[["top", "right"]].set_visible(False)
    if named:
        lower.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path, dpi=130)


def _spectra(axes: Any, layers: list[Any], kinds: list[int], rows: list[str]) -> bool:
    """A line per layer in the colour of its kind; of many layers the median of each kind, with its
    layers in pale. True when the lines have names."""
    import numpy as np

    colours, named = _colours(len(rows)), len(rows) <= _SHOWN_ROWS
    found: dict[int, list[Any]] = {}
    for s, kind in zip(layers, kinds, strict=True):
        sigma = np.array(s.singular_values)
        if sigma.size and sigma[0] > 0.0:
            found.setdefault(kind, []).append(sigma / sigma[0])
    many = sum(map(len, found.values())) > _LINES
    for kind, curves in found.items():
        name = rows[kind] + (" (median)" if many else "") if named else None
        for i, curve in enumerate(curves):
            axes.plot(
                np.arange(1, curve.size + 1), curve, color=colours[kind],
                alpha=0.1 if many else 0.55, linewidth=1.1,
                label=name if i == 0 and not many else None,
            )  # fmt: skip
        if many:
            size = min(curve.size for curve in curves)
            middle = np.median([curve[:size] for curve in curves], axis=0)
            axes.plot(np.arange(1, size + 1), middle, color=colours[kind], linewidth=2, label=name)
    return named and bool(found)


def _map(
    axes: Any, values: Any, rows: list[str], columns: list[int], colours: str, label: str
) -> None:
    import numpy as np

    # One layer of another kind must not take all of the colours.
    top, largest = np.nanpercentile(values, 95), np.nanmax(values)
    image = axes.imshow(
        values, aspect="auto", cmap=colours, vmin=0, vmax=top or 1.0, interpolation="nearest"
    )
    if values.shape[1] <= _NUMBERED and len(rows) <= _NUMBERED:
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                shade = "white" if value < 0.6 * top else "black"
                text = f"{value:.3g}"
                axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=7)
    if len(rows) <= _SHOWN_ROWS:
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
    else:
        axes.set_ylabel(f"{len(rows)} kinds of layer")
    step = -(-len(columns) // 32)
    axes.set_xticks(range(0, len(columns), step), columns[::step], fontsize=8)
    extend = "max" if largest > top else "neither"
    axes.figure.colorbar(image, ax=axes, label=label, pad=0.01, extend=extend)


def _colours(count: int) -> Any:
    from matplotlib import colormaps

    chart = colormaps["tab10" if count <= 10 else "tab20"]
    return [chart(i % chart.N) for i in range(count)]
