"""Part ``tests``: every test marked gpu, counted per backend."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.gpu_check.parts import BACKENDS, not_run

ROOT = Path(__file__).resolve().parents[2]


def backends_of(test: str) -> set[str]:
    """The backends that a test's name speaks of: whole words of its file, name and parameters.

    ``cuda`` in a file's name counts, so files about the device call it gpu.
    """
    return set(re.split(r"[^a-z0-9]+", test.lower())) & set(BACKENDS)


def _decoded(lines: list[str]) -> list[dict[str, Any]]:
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue  # the last line of a child that was stopped while it wrote
    return entries


def summarise(lines: list[str], finished: bool, seconds: float) -> dict[str, Any]:
    """The part's entry from the plugin's lines. A test that began and was never heard of again
    failed: it hung, or took the process with it."""
    entries = _decoded(lines)
    collected = sum(e["collected"] for e in entries if "collected" in e)
    tests = [e for e in entries if "test" in e]
    heard = {e["test"] for e in tests}
    begun = [e["begin"] for e in entries if "begin" in e]
    if begun and begun[-1] not in heard:
        tests.append({"test": begun[-1], "outcome": "failed", "why": "it never returned"})
    failures = [e for e in tests if e["outcome"] == "failed"]
    counts = {o: sum(e["outcome"] == o for e in tests) for o in ("passed", "failed", "skipped")}
    backends: dict[str, dict[str, str]] = {}
    for backend in BACKENDS:
        mine = [e for e in tests if backend in backends_of(e["test"])]
        wrong = [e for e in mine if e["outcome"] == "failed"]
        if wrong:
            status, why = "failed", f"{wrong[0]['test']}: {wrong[0]['why']}"
        elif not finished:
            status, why = "not run", "the tests did not finish in their time"
        elif any(e["outcome"] == "passed" for e in mine):
            status, why = "passed", ""
        else:
            status, why = "not run", "no test of it ran"
        backends[backend] = {"status": status, "why": why}
    nobodys = [e for e in failures if not backends_of(e["test"])]
    if nobodys:
        why = f"{nobodys[0]['test']}: {nobodys[0]['why']}"
        backends["any"] = {"status": "failed", "why": why}
    if failures:
        status, why = "failed", f"{len(failures)} of {len(tests)} tests failed"
    elif not finished:
        status, why = "not run", f"{len(tests)} of {collected} tests ran in the time given"
    elif not counts["passed"]:
        status, why = "not run", "no test ran"
    else:
        status, why = "passed", ""
    return {
        "status": status, "why": why, "seconds": seconds, "backends": backends, **counts,
        "collected": collected, "failures": [e["test"] for e in failures][:50],
    }  # fmt: skip


def marked_files() -> list[str]:
    """Only these are imported: what the others need may be absent here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if "mark.gpu" in f.read_text(encoding="utf-8")]


def run(seconds: float, select: str = "gpu") -> dict[str, Any]:
    """Runs the marked tests in a child; never longer than `seconds`."""
    if importlib.util.find_spec("pytest") is None:
        return not_run(f"{Path(sys.executable).name} has no pytest; pip install pytest")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcomes.jsonl"
        out.touch()
        command = [
            sys.executable, "-m", "pytest", "-m", select, "-q", "-p", "no:cacheprovider",
            "-p", "tools.gpu_check.outcomes", "--outcomes", str(out),
            "--seconds", str(max(1.0, seconds - 20.0)), *marked_files(),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False)
            # 0 all passed, 1 some failed, 5 none collected; 2 stopped by the deadline or broken.
            finished = done.returncode in (0, 1, 5)
        except subprocess.TimeoutExpired:
            finished = False
        lines = out.read_text(encoding="utf-8").splitlines()
    return summarise(lines, finished, round(time.monotonic() - start, 1))
