"""What the numbers were measured on."""

from __future__ import annotations

import datetime
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch

import lora_kernels

ISA_FLAGS = ("amx_bf16", "amx_int8", "amx_fp16", "avx512_bf16", "avx512f", "avx2")


def _cpuinfo(field: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(field):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "unknown"


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root)
    return done.stdout.strip() if done.returncode == 0 else ""


def command(module: str, arguments: list[str]) -> str:
    """What to type for the same measurement; where its files went does not matter."""
    kept, words = [], iter(arguments)
    for word in words:
        if word in ("--json", "--png"):
            next(words, None)
        elif not word.startswith(("--json=", "--png=")):
            kept.append(word)
    return shlex.join(["python", "-m", module, *kept])


def describe(module: str, arguments: list[str]) -> dict[str, Any]:
    """Device, software and command, as the head of a result record."""
    flags = set(_cpuinfo("flags").split())
    return {
        "device": {
            "type": "cpu",
            "name": _cpuinfo("model name"),
            "isa": [flag for flag in ISA_FLAGS if flag in flags],
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "lora_kernels": lora_kernels.__version__,
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command(module, arguments),
    }


def amx_peak(seconds: float = 0.5) -> tuple[float | None, str]:
    """(GFLOP/s of a bf16 tile loop on all threads, where it comes from or why it is absent)."""
    try:
        from lora_kernels import _C
    except ImportError as error:
        return None, f"lora_kernels._C is not built ({error})"
    if not hasattr(_C, "amx_peak_gflops"):
        return None, "this build of lora_kernels._C has no tile loop"
    try:
        peak = float(_C.amx_peak_gflops(seconds, torch.get_num_threads()))
    except RuntimeError as error:
        return None, str(error)
    if peak <= 0.0:
        return None, "this processor has no AMX"
    return peak, f"tile loop of {seconds} s on {torch.get_num_threads()} threads, same run"
