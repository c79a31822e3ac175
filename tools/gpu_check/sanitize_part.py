"""Part ``sanitize``: small problems under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tools.gpu_check.parts import not_run

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


def run(seconds: float, backends: tuple[str, ...] = ("triton", "cuda")) -> dict[str, Any]:
    """memcheck, racecheck and synccheck of each backend; never longer than `seconds`."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return not_run("compute-sanitizer is not on PATH")
    start, found = time.monotonic(), {}
    for backend in backends:
        entries = []
        for tool in TOOLS:
            left = seconds - (time.monotonic() - start)
            if left < 5:
                entries.append(("not run", f"no time left for {tool}"))
                continue
            entries.append(one(sanitizer, tool, backend, left))
        found[backend] = worst(entries)
    total = worst([(e["status"], f"{b}: {e['why']}") for b, e in found.items()])
    return {**total, "seconds": round(time.monotonic() - start, 1), "backends": found}


def one(sanitizer: str, tool: str, backend: str, seconds: float) -> tuple[str, str]:
    command = [
        sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all",
        "--print-limit", "20", sys.executable, "-m", "tools.gpu_check.small_shapes", backend,
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
