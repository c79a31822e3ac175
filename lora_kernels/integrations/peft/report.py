"""The report of `apply`, with a table that stays short for models of hundreds of layers."""

from __future__ import annotations

from dataclasses import dataclass

from lora_kernels.modules.report import LayerReport, Report


def _pattern(name: str) -> str:
    """Numbered parts of a module path as ``*``: the same layer of every block."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@dataclass(frozen=True)
class ApplyReport(Report):
    """Every LoRA layer of a model, in its order, and whether a call now runs fused.

    `backend` of a fused layer is what a call of 1024 rows would pick. `groups` is empty: each
    layer is fused by itself, and inputs that several layers share are read once per layer.
    """

    def __str__(self) -> str:
        """Layers that differ by block number alone share a row, if all else is equal."""
        if not self.layers:
            return "no LoRA layer found"
        alike: dict[tuple[str, str, str, str], list[LayerReport]] = {}
        for e in self.layers:
            alike.setdefault((_pattern(e.name), e.status, e.backend, e.reason), []).append(e)
        rows = [("layers", "status", "backend", "name", "reason")]
        for (pattern, status, backend, reason), same in alike.items():
            name = pattern if len(same) > 1 else same[0].name
            rows.append((str(len(same)), status, backend or "-", name, reason))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            f"{row[0]:>{widths[0]}}  "
            + "  ".join(c.ljust(w) for c, w in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        lines.append(f"{len(self.fused)} of {len(self.layers)} LoRA layers fused")
        return "\n".join(line.rstrip() for line in lines)
