"""The report of `apply`, with a table that stays short for models of hundreds of layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lora_kernels.modules.report import STOCK, LayerReport, Report

MLP, ROTARY = "gated_activation", "rotary_embedding"
RECOMPUTED = "recomputed_activation"
OFF = "fused_shrink is False"  # of what was not asked for nothing is printed


def _pattern(name: str) -> str:
    """Numbered parts of a module path as ``*``: the same layer of every block."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@dataclass(frozen=True)
class ApplyReport(Report):
    """Every LoRA layer of a model, in its order, and whether a call now runs fused.

    `backend` of a fused layer is what a call of 1024 rows would pick. `groups` holds a dict for
    every set of layers with one input, ``{"kind": "grouped_lora_linear", "name": path of the
    block, "members": [names], "status": "fused" or "stock", "reason"}``: stock ones are fused
    layer by layer. Attention blocks that rotate have one of kind ``rotary_embedding``, MLP blocks
    one of kind ``gated_activation``, or with recompute_activations ``recomputed_activation``; with
    fused_loss there is also one for each model whose loss was looked at.

    `norms` holds a dict for every RMS norm of a known class, ``{"kind": "rms_norm", "name",
    "status", "reason", "backend"}``. `shrinks` holds one for every block behind a norm, of kind
    ``norm_shrink``, and every MLP, of kind ``activation_shrink``, with the names of the layers
    whose S is made there (``fused``) or not.

    `packed_bytes` is about what training will keep in packed copies of frozen weights
    (``LORA_KERNELS_PACK``).
    """

    norms: list[dict[str, Any]] = field(default_factory=list)
    shrinks: list[dict[str, Any]] = field(default_factory=list)
    packed_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """``{"layers": [...], "groups": [...]}``, and ``"norms"``, ``"shrinks"`` and
        ``"packed_bytes"`` where the model has any."""
        more = {"norms": self.norms, "shrinks": self.shrinks}
        found: dict[str, Any] = {
            key: [dict(entry) for entry in some] for key, some in more.items() if some
        }
        if self.packed_bytes:
            found["packed_bytes"] = self.packed_bytes
        return {**super().to_dict(), **found}

    def __str__(self) -> str:
        """Layers that differ by block number alone share a row, if all else is equal."""
        groups = [*self._group_lines(), *self._norm_lines(), *self._shrink_lines()]
        if not self.layers:
            return "\n".join(groups) or "no LoRA layer found"
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
        lines += groups
        if self.packed_bytes:
            size = f"{self.packed_bytes / 2**20:.1f} MiB"
            lines.append(f"packed copies of frozen weights will take about {size}")
        lines.append(f"{len(self.fused)} of {len(self.layers)} LoRA layers fused")
        return "\n".join(line.rstrip() for line in lines)

    def _group_lines(self) -> list[str]:
        alike: Counter[tuple[str, str]] = Counter()
        for entry in self.groups:
            if "members" in entry:
                what = f"{_pattern(entry['name'])}: {', '.join(entry['members'])}"
                how = "computed together" if len(entry["members"]) > 1 else "one layer for all"
                how = "the activation is one pass" if entry["kind"] == MLP else how
                how = "the activation is recomputed" if entry["kind"] == RECOMPUTED else how
                how = "the rotation is one pass" if entry["kind"] == ROTARY else how
                alike[what, entry["reason"] or how] += 1
        return [f"{count} x {what}: {how}" for (what, how), count in alike.items()]

    def _norm_lines(self) -> list[str]:
        alike = Counter(n["reason"] or f"normalized on {n['backend']}" for n in self.norms)
        return [f"{count} RMS norms: {how}" for how, count in alike.items()]

    def _shrink_lines(self) -> list[str]:
        """What does not happen is one line, of every kind together."""
        makers = {"norm_shrink": "norm", "activation_shrink": "activation"}
        made: Counter[str] = Counter()
        for e in (e for e in self.shrinks if e["reason"] != OFF):
            if e["status"] == STOCK:
                made[f"blocks whose layers make S themselves: {e['reason']}"] += 1
                continue
            which = f"{_pattern(e['name'])}: {', '.join(e['members'])}"
            when = f", {e['reason']}" if e["reason"] else ""
            made[f"x {which}: S made by the {makers[e['kind']]} in front{when}"] += 1
        return [f"{count} {line}" for line, count in made.items()]
