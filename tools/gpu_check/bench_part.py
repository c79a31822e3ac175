"""Part ``bench``: the benchmark of every op with kernels, with the ceilings of the same run.

    python -m tools.gpu_check.bench_part FILE SECONDS

is the child that measures. It writes a JSON line before a provider first runs and one per row, so
that a kernel that never returns is known by name and costs no row of another.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu, gpu_report
from benchmarks.gpu_ops import ROWS
from benchmarks.gpu_ops.row import GpuOp, Run
from tools.gpu_check.parts import BACKENDS, covered

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 10


def ours(provider: str) -> bool:
    return provider.removesuffix("-fp32") in BACKENDS


def entry(rows: list[dict[str, Any]], why: str, seconds: float) -> dict[str, Any]:
    """The part's entry; `why` is what cut it short, or empty. Others' failures are theirs."""
    wrong = [
        r for r in rows
        if ours(r["provider"]) and (r["skipped"] or "").startswith(("WRONG", "FAILED"))
    ]  # fmt: skip
    status = "failed" if wrong else "passed" if any(not r["skipped"] for r in rows) else "not run"
    if wrong:
        first = wrong[0]
        why = f"{first['op']}, {first['provider']} at {first['case']}: {first['skipped'][:160]}"
    elif status == "not run":
        why = why or "nothing was timed"
    return {"status": status, "why": why, "seconds": round(seconds, 1), "ops": {}}


def collect(lines: list[str], ending: str) -> tuple[list[dict[str, Any]], dict[str, float] | None]:
    """(rows, ceilings) from the child's lines. `ending`: how it ended where it did not end well;
    the provider that was running then has a row that says so."""
    rows: list[dict[str, Any]] = []
    top, running = None, None
    for text in lines:
        try:
            said = json.loads(text)
        except ValueError:
            continue  # the last line of a child that was stopped while it wrote
        if "ceilings" in said:
            top = said["ceilings"]
        elif "begin" in said:
            running = said["begin"]
        elif "timing" in said:
            running = None
        else:
            rows.append(said)
    if ending and running is not None:
        rows.append({**running, "skipped": f"FAILED: {ending}"})
    return rows, top


def run(
    seconds: float,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, float] | None]:
    """(the part's entry, rows, ceilings); never longer than `seconds`."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        out.touch()
        command = [sys.executable, "-m", "tools.gpu_check.bench_part", str(out), str(seconds)]
        ending = ""
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False).returncode
            if code:
                ending = f"the process ended with code {code}"
        except subprocess.TimeoutExpired:
            ending = "it did not return in its time"
        rows, top = collect(out.read_text(encoding="utf-8").splitlines(), ending)
    return entry(rows, ending, time.monotonic() - start), rows, top


def in_turn() -> Iterator[tuple[GpuOp, int]]:
    """(op, number of a case): the first case of every op comes before the second of any."""
    rows = [ROWS[op] for op in covered()]
    for number in range(max(row.count() for row in rows)):
        for row in rows:
            if number < row.count():
                yield row, number


def child(
    out: Path, seconds: float, device: str = "cuda", count: tuple[str, ...] = gpu.MODES
) -> int:
    # A case takes up to a minute, the first one most: none is started in the last one.
    deadline = time.monotonic() + max(1.0, seconds - 60.0)
    with out.open("a", encoding="utf-8") as file:

        def write(**said: Any) -> None:
            file.write(json.dumps(said) + "\n")
            file.flush()

        def announce(begun: dict[str, Any] | None) -> None:
            write(timing=True) if begun is None else write(begin=begun)

        timed = gpu.device_clock()
        top = gpu.ceilings(timed)
        write(ceilings=top)
        print(gpu_report.HEADER, flush=True)
        run = Run(top, timed, ROUNDS, device, count=count, announce=announce)
        for op, number in in_turn():
            if time.monotonic() >= deadline:
                print(f"no time left for {op.name}, case {number + 1} of {op.count()}", flush=True)
                continue
            for made in op.bench(number, op.providers(), run):
                write(**made)
                print(gpu_report.line(made), flush=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if number == 0 and op.name == next(iter(ROWS)):
                # Counting launches takes its time: of the first case in all modes, then in one.
                run = replace(run, count=count[-1:])
    return 0


if __name__ == "__main__":
    sys.exit(child(Path(sys.argv[1]), float(sys.argv[2])))
