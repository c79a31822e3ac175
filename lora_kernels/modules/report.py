"""What happened to each layer of a model, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

FUSED = "fused"
STOCK = "stock"


@dataclass(frozen=True)
class LayerReport:
    """One layer: `status` is ``fused`` or ``stock``; a stock layer has a reason."""

    name: str
    status: str
    reason: str = ""
    backend: str = ""


@dataclass(frozen=True)
class Report:
    """Every layer that was looked at, in the order of the model, and the fused groups.

    A group is a dict of plain JSON values; its keys are the concern of who makes it.
    """

    layers: list[LayerReport] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)

    @property
    def fused(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.status == FUSED]

    @property
    def stock(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.status == STOCK]

    def to_dict(self) -> dict[str, Any]:
        """``{"layers": [{"name", "status", "reason", "backend"}, ...], "groups": [...]}``"""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "groups": [dict(group) for group in self.groups],
        }

    def __str__(self) -> str:
        header = ("layer", "status", "backend", "reason")
        rows = [(e.name, e.status, e.backend, e.reason) for e in self.layers]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row[:3], widths, strict=True)), row[3]])
            for row in [header, tuple("-" * len(h) for h in header), *rows]
        ]
        groups = f", {len(self.groups)} groups" if self.groups else ""
        lines.append(f"{len(self.fused)} of {len(self.layers)} layers fused{groups}")
        return "\n".join(line.rstrip() for line in lines)
