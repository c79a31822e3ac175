"""The record of a check in parts: its file, what is kept of an earlier part, the verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import record as records
from lora_kernels.ops import _evidence
from lora_kernels.ops._registry import OPS
from lora_kernels.ops._shrink_pairs import PAIRS

PARTS = ("tests", "sanitize", "bench")
FLOOR = _evidence.FLOOR
KERNELS = ("triton", "cuda")
BACKENDS = (FLOOR, *KERNELS)
STATUSES = ("passed", "failed", "not run")
NOBODYS = "any"  # failures that no op or no backend owns


def covered() -> dict[str, tuple[str, ...]]:
    """Op -> `aten` and its backends for GPUs, of every op that has one, and of pairs of ops."""
    specs = (*OPS, *PAIRS)
    found = {spec.name: tuple(b for b in KERNELS if b in spec.backends) for spec in specs}
    return {name: (FLOOR, *kernels) for name, kernels in found.items() if kernels}


def not_run(why: str) -> dict[str, Any]:
    return {"status": "not run", "why": why, "seconds": 0.0, "ops": {}}


def path_of(record: dict[str, Any], results: Path) -> Path:
    """results/<device>/<date>-<commit>.json"""
    day = record["date"][:10].replace("-", "")
    name = f"{day}-{record['commit'] or 'uncommitted'}.json"
    return results / records.slug(record["device"]) / name


def merge(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """`record` with the parts that an earlier call left in `path`.

    Kept only where the earlier call ran the same sources on the same device and versions; a file
    that cannot be read has no parts.
    """
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        same = all(before[key] == record[key] for key in ("schema", "op", "device", "digests"))
        same = same and all(before[key] == record[key] for key in ("torch", "triton", "commit"))
        kept = {k: v for k, v in before["parts"].items() if v["status"] in STATUSES}
        rows, top = list(before["rows"]), before["ceilings"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return record
    if not same:
        return record
    ran = {k: v for k, v in record["parts"].items() if v["status"] != "not run" or k not in kept}
    merged = {**record, "parts": {**kept, **ran}}
    if not record["rows"]:
        merged |= {"rows": rows, "ceilings": top}
    return merged


def _bench_verdict(rows: list[dict[str, Any]], op: str, backend: str) -> tuple[str, str]:
    mine = [r for r in rows if r["op"] == op and r["provider"] in (backend, f"{backend}-fp32")]
    for r in mine:
        if r["skipped"] and r["skipped"].startswith(("WRONG", "FAILED")):
            return "failed", f"benchmark, {r['case']} {r['provider']}: {r['skipped'][:160]}"
    if any(not r["skipped"] for r in mine):
        return "passed", ""
    reasons = [r["skipped"] for r in mine]
    return "not run", f"benchmark: {reasons[0]}" if reasons else "benchmark: not run"


def verdicts(record: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Per op and backend ``{"verdict", "why"}``.

    passed: its tests and its benchmark gate passed, and no sanitizer found anything. failed: one
    of them failed. not run: neither; `why` says what is missing. A failed test that belongs to
    no backend counts against all of them, of its op or, where it names no op, of every op.
    """
    return {op: {b: _verdict(record, op, b) for b in own} for op, own in covered().items()}


def _verdict(record: dict[str, Any], op: str, backend: str) -> dict[str, Any]:
    failed, missing, notes = [], [], []
    for name in ("tests", "sanitize"):
        part = record["parts"].get(name, not_run("not asked for"))
        mine = part["ops"].get(op, {})
        own = mine.get(backend, {"status": "not run", "why": part["why"]})
        nobodys = mine.get(NOBODYS)
        if own["status"] == "failed":
            failed.append(f"{name}: {own['why']}")
        elif nobodys is not None and nobodys["status"] == "failed":
            failed.append(f"{name}: {nobodys['why']}")
        elif own["status"] == "not run":
            (notes if name == "sanitize" else missing).append(f"{name}: {own['why']}")
    status, why = _bench_verdict(record["rows"], op, backend)
    if status == "failed":
        failed.append(why)
    elif status == "not run":
        missing.append(why)
    verdict = "failed" if failed else "not run" if missing else "passed"
    return {"verdict": verdict, "why": failed or [*missing, *notes]}
