"""What a fine-tuning run gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What the Trainer adds to the metrics of an evaluation: its own speed.
SPEEDS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


@dataclass(frozen=True)
class Result:
    """`output` is the folder of the run, `report` what its ``report.json`` holds."""

    output: Path
    report: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """Folder of the adapter, in PEFT's format."""
        return self.output / self.report["adapter"]

    def __str__(self) -> str:
        """The table that ends a run."""
        r = self.report
        name = run_name(r)
        rows = [
            ("", r["metric"], "seconds", "ms/step"),
            ("before", f"{r['before']:.3f}", "", ""),
            (f"after, {name}", f"{r['after']:.3f}", *_times(r["seconds"], r["step_seconds"])),
        ]
        if r["after_stock"] is not None:
            times = _times(r["seconds_stock"], r["step_seconds_stock"])
            rows.append(("after, stock PEFT", f"{r['after_stock']:.3f}", *times))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = []
        for row in rows:
            numbers = (c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))
            lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
        others = [n for n in r["metrics"] if n not in (r["metric"], "loss", "tokens", "f1_macro")]
        before = r["metrics_before"] or {}
        for n in [n for n in others if n not in SPEEDS and r["metrics"][n] is not None][:4]:
            lines.append(f"{n}: {_short(before.get(n))} -> {_short(r['metrics'][n])}")
        notes = [f"{r['examples']['test']} test examples, {r['steps']} steps, {r['precision']}, "
                 f"{r['threads']} thread{'s' * (r['threads'] > 1)}, {r['device']}"]  # fmt: skip
        if r["layers"]:
            notes.append(f"{r['fused_layers']} of {r['total_layers']} layers fused")
        if r["speedup"] is not None:
            notes[-1] += f"; median step {r['speedup']:.2f}x as fast as stock PEFT"
        if r["stopped_early"]:
            notes.append("stopped early: validation no longer improved")
        notes.append(f"written: {self.output}/ (adapter/, report.json, report.md, loss.png)")
        return "\n".join(line.rstrip() for line in (*lines, "", *notes))


def run_name(report: dict[str, Any]) -> str:
    """What trained a run, for tables and legends."""
    if report["method"] not in ("lora", "dora", "qlora"):
        return str(report["method"])
    return "lora_kernels" if report["kernels"] else "stock PEFT"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _times(seconds: float, step: float) -> tuple[str, str]:
    return f"{seconds:.1f}", f"{1000 * step:.0f}"


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: None stands for them."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
