"""What the numbers were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch

import lora_kernels
from benchmarks.peers import UnavailableError
from lora_kernels.ops import _ledger

ISA_FLAGS = ("amx_bf16", "amx_int8", "amx_fp16", "avx512_bf16", "avx512f", "avx2")
OUTPUTS = ("--json", "--png", "--results", "--commit", "--out")


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
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def command(module: str, arguments: list[str]) -> str:
    """What to type for the same measurement; where its files went does not matter."""
    kept, words = [], iter(arguments)
    for word in words:
        if word in OUTPUTS:
            next(words, None)
        elif not word.startswith(tuple(f"{option}=" for option in OUTPUTS)):
            kept.append(word)
    return shlex.join(["python", "-m", module, *kept])


def cpu() -> dict[str, Any]:
    flags = set(_cpuinfo("flags").split())
    return {
        "type": "cpu",
        "name": _cpuinfo("model name"),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def gpu(index: int = 0) -> dict[str, Any]:
    """Of the GPU that torch sees; UnavailableError where it sees none."""
    here = _ledger.device(index)
    if here is None:
        built = torch.version.cuda or torch.version.hip
        raise UnavailableError(
            f"no GPU here: torch {torch.__version__} "
            + (f"(built for {built}) sees no device" if built else "is built without CUDA")
        )
    found = torch.cuda.get_device_properties(index)
    return {
        "type": "cuda",
        "name": here.name,
        "architecture": here.architecture,
        "processors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": int(getattr(found, "L2_cache_size", 0)),
        "runtime": torch.version.cuda or torch.version.hip,
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(
    module: str, arguments: list[str], device: dict[str, Any] | None = None, commit: str = ""
) -> dict[str, Any]:
    """Device, software and command, as the head of a result record; of the CPU by default."""
    return {
        "device": device or cpu(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "lora_kernels": lora_kernels.__version__,
        "commit": commit or _git("rev-parse", "--short=12", "HEAD"),
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
