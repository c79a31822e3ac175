"""Part ``tests``: every test marked gpu, in one process per backend.

An invalid access of a kernel ends the use of the device for its whole process: apart, it costs the
other backends nothing. The processes run side by side, since most of their time is compilation.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from lora_kernels.ops._registry import OPS
from lora_kernels.ops._shrink_pairs import PAIRS
from tools.gpu_check.parts import BACKENDS, NOBODYS, covered, not_run

ROOT = Path(__file__).resolve().parents[2]
OTHERS = "others"
GROUPS = {**{b: b for b in BACKENDS}, OTHERS: " and ".join(f"not {b}" for b in BACKENDS)}


class Group(NamedTuple):
    """What one process told (lines of the plugin), and whether it came to its end."""

    lines: list[str]
    finished: bool


def backends_of(test: str) -> set[str]:
    """The backends that a test's name speaks of: whole words of its file, name and parameters.

    ``cuda`` in a file's name counts, so files about the device call it gpu.
    """
    return set(re.split(r"[^a-z0-9]+", test.lower())) & set(BACKENDS)


def ops_of(test: str) -> set[str]:
    """The ops that a test speaks for: the one that its file names, else those that its name or
    parameters name, else all of them."""
    file, _, rest = test.partition("::")
    every = [spec.name for spec in (*OPS, *PAIRS)]
    for text in (file, rest):
        named = {op for op in every if re.search(rf"(?<![a-z]){op}(?![a-z])", text)}
        if named:
            return named
    return set(every)


def _decoded(lines: list[str]) -> list[dict[str, Any]]:
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue  # the last line of a child that was stopped while it wrote
    return entries


def heard(group: Group) -> list[dict[str, Any]]:
    """The tests of a group. One that began and was never heard of again failed: it hung, or took
    the process with it."""
    entries = _decoded(group.lines)
    tests = [e for e in entries if "test" in e]
    names = {e["test"] for e in tests}
    begun = [e["begin"] for e in entries if "begin" in e]
    if begun and begun[-1] not in names:
        tests.append({"test": begun[-1], "outcome": "failed", "why": "it never returned"})
    return tests


def _one(tests: list[dict[str, Any]], finished: bool) -> dict[str, str]:
    wrong = [e for e in tests if e["outcome"] == "failed"]
    if wrong:
        return {"status": "failed", "why": f"{wrong[0]['test']}: {wrong[0]['why']}"}
    if not finished:
        return {"status": "not run", "why": "the tests did not finish in their time"}
    if any(e["outcome"] == "passed" for e in tests):
        return {"status": "passed", "why": ""}
    return {"status": "not run", "why": "no test of it ran"}


def summarise(groups: dict[str, Group], seconds: float) -> dict[str, Any]:
    """The part's entry, per op and backend. A test that speaks of several counts for each."""
    told = {name: heard(group) for name, group in groups.items()}
    tests = list({e["test"]: e for entries in told.values() for e in entries}.values())
    failures = [e for e in tests if e["outcome"] == "failed"]
    counts = {o: sum(e["outcome"] == o for e in tests) for o in ("passed", "failed", "skipped")}
    ops: dict[str, dict[str, dict[str, str]]] = {}
    for op, backends in covered().items():
        of_op = [e for e in tests if op in ops_of(e["test"])]
        ops[op] = {}
        for backend in backends:
            mine = [e for e in of_op if backend in backends_of(e["test"])]
            finished = backend not in groups or groups[backend].finished
            ops[op][backend] = _one(mine, finished)
        nobodys = [e for e in of_op if e["outcome"] == "failed" and not backends_of(e["test"])]
        if nobodys:
            ops[op][NOBODYS] = _one(nobodys, True)
    late = [name for name, group in groups.items() if not group.finished]
    if failures:
        status, why = "failed", f"{len(failures)} of {len(tests)} tests failed"
    elif late:
        status, why = "not run", f"{', '.join(late)} did not finish: {len(tests)} tests ran"
    elif not counts["passed"]:
        status, why = "not run", "no test ran"
    else:
        status, why = "passed", ""
    return {
        "status": status, "why": why, "seconds": seconds, "ops": ops, **counts,
        "failures": [e["test"] for e in failures][:50],
    }  # fmt: skip


def marked_files() -> list[str]:
    """Only these are imported: what the others need may be absent here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if "mark.gpu" in f.read_text(encoding="utf-8")]


def command(out: Path, seconds: float, choice: str) -> list[str]:
    return [
        sys.executable, "-m", "pytest", "-m", "gpu", "-k", choice, "-q", "--tb=short",
        "-p", "no:cacheprovider", "-p", "tools.gpu_check.outcomes", "--outcomes", str(out),
        "--seconds", str(max(1.0, seconds - 20.0)), *marked_files(),
    ]  # fmt: skip


def run(seconds: float) -> dict[str, Any]:
    """Runs the marked tests in children; never longer than `seconds`."""
    if importlib.util.find_spec("pytest") is None:
        return not_run(f"{Path(sys.executable).name} has no pytest; pip install pytest")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outs = {name: Path(folder) / f"{name}.jsonl" for name in GROUPS}
        children = {}
        for name, choice in GROUPS.items():
            outs[name].touch()
            children[name] = subprocess.Popen(command(outs[name], seconds, choice), cwd=ROOT)
        finished = {}
        for name, child in children.items():
            left = seconds - (time.monotonic() - start)
            try:
                # 0 all passed, 1 some failed, 5 none collected; 2 the deadline, or broken.
                finished[name] = child.wait(timeout=max(0.1, left)) in (0, 1, 5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                finished[name] = False
        groups = {
            name: Group(out.read_text(encoding="utf-8").splitlines(), finished[name])
            for name, out in outs.items()
        }
    return summarise(groups, round(time.monotonic() - start, 1))
