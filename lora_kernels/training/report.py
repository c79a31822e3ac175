"""The numbers of a run as a dictionary; :mod:`report_page` makes the page to read."""

from __future__ import annotations

import platform
from collections import Counter
from statistics import median
from typing import Any

import torch

from lora_kernels._version import __version__
from lora_kernels.environment import cpu_name
from lora_kernels.training.config import Config
from lora_kernels.training.one_run import Run
from lora_kernels.training.tasks import Task


def make_report(
    config: Config, task: Task, precision: str, run: Run, stock: Run | None
) -> dict[str, Any]:
    """What ``report.json`` holds. Keys ending in ``_stock`` are None without a comparison."""
    fused = [layer for layer in run.layers if layer["status"] == "fused"]
    # Equal numbers of equal steps: the ratio of the medians is that of typical steps, which a
    # pause of the machine during one of them does not move.
    speedup = _middle(stock) / _middle(run) if stock else None
    return {
        "task": task.name,
        "model": config.model,
        "dataset": config.data.path,
        "metric": task.metric,
        "before": run.before,
        "after": run.after,
        "after_stock": stock.after if stock else None,
        "seconds": run.seconds,
        "seconds_stock": stock.seconds if stock else None,
        "speedup": speedup,
        "fused_layers": len(fused),
        "total_layers": len(run.layers),
        "adapter": "adapter",
        "lora_kernels": __version__,
        "torch": torch.__version__,
        "device": _device(),
        "kernels": config.kernels,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "examples": task.sizes,
        "method": config.method,
        "trained_parameters": run.trained,
        "parameters": run.parameters,
        "steps": run.steps,
        "steps_timed": len(run.step_seconds),
        "stopped_early": run.stopped_early,
        "best_step": run.best_step,
        "step_seconds": _middle(run),
        "step_seconds_stock": _middle(stock) if stock else None,
        "examples_per_second": _rate(run.examples_seen, run),
        "tokens_per_second": _rate(run.tokens_seen, run),
        "peak_memory": run.peak_memory,
        "peak_memory_stock": stock.peak_memory if stock else None,
        "metrics_before": run.metrics_before,
        "metrics": run.metrics,
        "more_is_better": task.more_is_better,
        "metrics_stock": stock.metrics if stock else None,
        "losses": run.losses,
        "losses_stock": stock.losses if stock else None,
        "validation_losses": run.validation_losses,
        "validation_losses_stock": stock.validation_losses if stock else None,
        "curves": run.curves,
        "layers": run.layers,
        "kernels_used": kernels_used(run.layers),
        "confusion": run.details.get("confusion"),
        "samples": run.details.get("samples"),
        "notes": task.notes,
        "config": config.to_dict(),
    }


def kernels_used(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many adapters run on which backend, or why they do not; most common first."""
    counts = Counter((e["status"], e["backend"] or "", e["reason"] or "") for e in layers)
    return [
        {"layers": count, "status": status, "backend": backend, "reason": reason}
        for (status, backend, reason), count in counts.most_common()
    ]


def _middle(run: Run) -> float:
    """Seconds of the median step; 0 where a resumed run had nothing left to do."""
    return median(run.step_seconds) if run.step_seconds else 0.0


def _rate(count: int, run: Run) -> float | None:
    return count / run.seconds if run.seconds else None


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
