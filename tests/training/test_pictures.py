"""Curves of a run: what is drawn is what the report holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from lora_kernels.training import loss_plot, metric_plot
from lora_kernels.training.loss_plot import running_mean


def report(steps: int, stock: bool) -> dict[str, Any]:
    losses = [(i + 1, 1.0 / (i + 1)) for i in range(steps)]
    return {
        "method": "lora", "kernels": True, "model": "m", "dataset": "d", "task": "classification",
        "metric": "accuracy", "losses": losses, "losses_stock": losses if stock else None,
        "validation_losses": losses[::10], "validation_losses_stock": losses[::10],
        "curves": {"accuracy": [(steps, 0.5)], "f1": [(steps, None)]}, "steps": steps,
        "best_step": None, "metrics_before": {"accuracy": 0.1}, "metrics": {"accuracy": 0.7},
    }  # fmt: skip


def lines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[float], list[float]]]:
    """What axes.plot is given from now on: (label, x, y)."""
    from matplotlib.axes import Axes

    drawn: list[tuple[str, list[float], list[float]]] = []
    plot = Axes.plot

    def spy(self: Axes, x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        drawn.append((kwargs.get("label", ""), list(x), list(y)))
        return plot(self, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy)
    return drawn


def test_short_curves_are_drawn_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, given = lines(monkeypatch), report(40, stock=True)
    loss_plot.draw_losses(tmp_path / "loss.png", given)
    assert (tmp_path / "loss.png").stat().st_size > 1000
    names = [name for name, _, _ in drawn]
    assert names == ["lora_kernels, training", "lora_kernels, validation", "stock PEFT, training",
                     "stock PEFT, validation"]  # fmt: skip
    assert drawn[0][2] == [loss for _, loss in given["losses"]]


def test_long_curves_say_that_they_are_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, given = lines(monkeypatch), report(400, stock=False)
    loss_plot.draw_losses(tmp_path / "loss.png", given)
    raw, mean = drawn[0], drawn[1]
    assert raw[2] == [loss for _, loss in given["losses"]]
    assert mean[0] == "lora_kernels, training (running mean)" and mean[2] != raw[2]


def test_running_mean() -> None:
    assert running_mean([1.0, 2.0, 6.0, 3.0], 3) == [1.5, 3.0, 11.0 / 3.0, 4.5]
    assert all(map(math.isclose, running_mean([0.1] * 9, 4), [0.1] * 9))
    assert running_mean([5.0], 7) == [5.0] and running_mean([], 3) == []


def test_metrics_begin_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = lines(monkeypatch)
    metric_plot.draw_metrics(tmp_path / "metrics.png", report(40, stock=False))
    assert drawn == [
        ("validation", [40], [0.5]),
        ("test, before and after", [0, 40], [0.1, 0.7]),
    ]  # f1 was never defined
    metric_plot.draw_metrics(tmp_path / "none.png", {**report(9, False), "curves": {}})
    assert not (tmp_path / "none.png").exists()
