"""What a fine-tuning run gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
        name = "lora_kernels" if r["kernels"] else "stock PEFT"
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
        notes = [f"{r['examples']['test']} test examples, {r['steps']} steps, {r['precision']}, "
                 f"{r['threads']} thread{'s' * (r['threads'] > 1)}, {r['device']}"]  # fmt: skip
        if r["layers"]:
            notes.append(f"{r['fused_layers']} of {r['total_layers']} layers fused")
        if r["speedup"] is not None:
            notes[-1] += f"; median step {r['speedup']:.2f}x as fast as stock PEFT"
        notes.append(f"written: {self.output}/ (adapter/, report.json, report.md, loss.png)")
        return "\n".join(line.rstrip() for line in (*lines, "", *notes))


def _times(seconds: float, step: float) -> tuple[str, str]:
    return f"{seconds:.1f}", f"{1000 * step:.0f}"
