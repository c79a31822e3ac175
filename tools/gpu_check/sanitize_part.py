"""Part ``sanitize``: small problems under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools.gpu_check.parts import KERNELS, covered, not_run

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 9  # exit code of the sanitizer when it found something


def judge(code: int | None, tool: str, output: str) -> tuple[str, str]:
    """(status, why) of one run; None: it ran out of time."""
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    last = lines[-1][:160] if lines else ""
    if code is None:
        return "not run", f"{tool} ran out of time"
    if code == 0:
        return "passed", ""
    if code == FOUND:
        found = [line for line in lines if "=========" in line]
        return "failed", f"{tool}: {(found or [last])[0][:160]}"
    if code == 1:
        return "failed", f"{tool}: wrong results: {last}"
    return "not run", f"{tool}: {last or f'exit code {code}'}"


def worst(entries: list[tuple[str, str]]) -> dict[str, str]:
    for status in ("failed", "not run"):
        for entry in entries:
            if entry[0] == status:
                return {"status": status, "why": entry[1]}
    return {"status": "passed", "why": ""}


def run(seconds: float, ops: tuple[str, ...] | None = None) -> dict[str, Any]:
    """memcheck, racecheck and synccheck of every op's kernels; never longer than `seconds`.

    A process per op, backend and tool, some of them side by side, since most of their time is
    start and compilation; the first tool of all comes before the second of any.
    """
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return not_run("compute-sanitizer is not on PATH")
    start = time.monotonic()
    asked = {op: own for op, own in covered().items() if ops is None or op in ops}
    jobs = [
        (tool, op, b) for tool in TOOLS for op, own in asked.items() for b in own if b in KERNELS
    ]

    def work(job: tuple[str, str, str]) -> tuple[str, str]:
        left = seconds - (time.monotonic() - start)
        return ("not run", f"no time left for {job[0]}") if left < 5 else one(sanitizer, *job, left)

    with ThreadPoolExecutor(max(1, min(6, (os.cpu_count() or 2) // 2))) as pool:
        told = dict(zip(jobs, pool.map(work, jobs), strict=True))
    found: dict[str, dict[str, dict[str, str]]] = {}
    for op, own in asked.items():
        mine = {b: [told[tool, op, b] for tool in TOOLS] for b in own if b in KERNELS}
        found[op] = {b: worst(entries) for b, entries in mine.items()}
    flat = [
        (e["status"], f"{op}, {b}: {e['why']}") for op, of in found.items() for b, e in of.items()
    ]
    return {**worst(flat), "seconds": round(time.monotonic() - start, 1), "ops": found}


def one(sanitizer: str, tool: str, op: str, backend: str, seconds: float) -> tuple[str, str]:
    command = [
        sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all",
        "--print-limit", "20",
        sys.executable, "-m", "tools.gpu_check.small_shapes", op, backend,
    ]  # fmt: skip
    # Each tensor an allocation of its own, so that an access past its end is one.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=seconds, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return judge(None, tool, "")
    return judge(done.returncode, tool, done.stdout)
