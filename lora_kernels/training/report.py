"""The numbers of a run, as a dictionary and as a page to read."""

from __future__ import annotations

import platform
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
    speedup = median(stock.step_seconds) / median(run.step_seconds) if stock else None
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
        "steps": len(run.step_seconds),
        "step_seconds": median(run.step_seconds),
        "step_seconds_stock": median(stock.step_seconds) if stock else None,
        "metrics": run.metrics,
        "metrics_stock": stock.metrics if stock else None,
        "losses": run.losses,
        "losses_stock": stock.losses if stock else None,
        "validation_losses": run.validation_losses,
        "validation_losses_stock": stock.validation_losses if stock else None,
        "layers": run.layers,
        "config": config.to_dict(),
    }


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


def markdown(report: dict[str, Any]) -> str:
    """``report.md``."""
    name = "lora_kernels" if report["kernels"] else "stock PEFT"
    rows = [
        f"| before fine-tuning | {report['before']:.3f} | | |",
        _row(name, report["after"], report["seconds"], report["step_seconds"]),
    ]
    if report["after_stock"] is not None:
        rows.append(
            _row("stock PEFT", report["after_stock"], report["seconds_stock"],
                 report["step_seconds_stock"])
        )  # fmt: skip
    examples = ", ".join(f"{n} {name}" for name, n in report["examples"].items())
    parts = [
        f"# {report['task'].capitalize()}: {report['dataset']}",
        f"Model `{report['model']}`, {report['precision']}, {report['steps']} steps of "
        f"{report['config']['train']['batch_size']} texts, seed {report['config']['seed']}. "
        f"Examples: {examples}.",
        f"| | {report['metric']} (test) | seconds | ms per step |\n|---|---|---|---|\n"
        + "\n".join(rows),
    ]
    if report["speedup"] is not None:
        parts.append(f"Speed-up of the median step: **{report['speedup']:.2f}x**.")
    parts += [
        "![training and validation loss](loss.png)",
        "## How it was measured",
        _method(report),
    ]
    parts += _layers(report)
    parts += [
        "## Files\n\n"
        "- `adapter/`: PEFT's format with the trained head; `PeftModel.from_pretrained` loads it\n"
        "- `report.json`: every number of this page, both loss curves, the whole configuration\n"
        "- `loss.png`: the curves above",
        '```\nlora-kernels predict RUN_FOLDER "text..."\n```',
    ]
    return "\n\n".join(parts) + "\n"


def _row(name: str, metric: float, seconds: float, step: float) -> str:
    return f"| {name} | {metric:.3f} | {seconds:.1f} | {1000 * step:.1f} |"


def _method(report: dict[str, Any]) -> str:
    text = (
        f"lora_kernels {report['lora_kernels']}, torch {report['torch']}, Python "
        f"{report['python']}, {report['device']}, CPU threads: {report['threads']}. Seconds are "
        "the sum over all optimizer steps of forward, backward and update; loading data, "
        "evaluating and saving are not in them. Before the clock starts, two training passes "
        "whose gradients are discarded create threads, library primitives and packed copies of "
        "frozen weights; then the seed is set again."
    )
    if report["speedup"] is not None:
        text += (
            " The stock run has the same seed, data order, precision, threads and untimed passes. "
            "It lives in a second process, and the two take turns step by step: one of them "
            "computes while the other sleeps, so both see the same machine. The speed-up is the "
            "ratio of the median steps."
        )
    return text


def _layers(report: dict[str, Any]) -> list[str]:
    if not report["layers"]:
        return []
    text = f"## Layers\n\n{report['fused_layers']} of {report['total_layers']} adapters are fused."
    stock = [layer for layer in report["layers"] if layer["status"] != "fused"]
    if stock:
        text += "\n\n| layer | why not fused |\n|---|---|\n"
        text += "\n".join(f"| `{layer['name']}` | {layer['reason']} |" for layer in stock)
    return [text]
