"""Loader of the compiled CUDA library; keeps the reason when it is absent.

The library is lora_kernels/_cuda.so, or the file that ``LORA_KERNELS_CUDA_LIBRARY`` names (one
built elsewhere and carried to a machine without a compiler). It is on the LibTorch stable ABI,
target torch 2.11, so it need not match the installed torch or Python.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).resolve().parents[1]
_VARIABLE = "LORA_KERNELS_CUDA_LIBRARY"
# What every kernel has a variant for; 8.6, 8.9 and 12.x have 99 KiB, 8.0 and 9.0 more.
_SHARED_BYTES = 98 << 10  # kSharedMemoryNeeded of csrc/lora_linear/cuda/launch.h


def path() -> Path:
    given = os.environ.get(_VARIABLE, "")
    return Path(given) if given else _FOLDER / "_cuda.so"


@functools.cache
def load() -> tuple[Any, str]:
    """(the torch.ops namespace of the library, "") or (None, reason)."""
    library = path()
    if not library.is_file():
        if os.environ.get(_VARIABLE):
            return None, f"{_VARIABLE}={str(library)!r} is not a file"
        note = _FOLDER / "_cuda_skipped.txt"
        why = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
        hint = f": {why}" if why else " (pip install --no-build-isolation builds it where nvcc is)"
        return None, f"lora_kernels/_cuda.so is not built{hint}"
    try:
        torch.ops.load_library(str(library.resolve()))
        torch.ops.lora_kernels_cuda.build_info()
    except (OSError, RuntimeError, AttributeError) as error:
        return None, f"{library.name} cannot be loaded: {' '.join(str(error).split())}"
    return torch.ops.lora_kernels_cuda, ""


def broken() -> bool:
    """Built, but not usable: something that should work does not."""
    return load()[0] is None and path().is_file()


def build_info() -> dict[str, Any]:
    """What was built, where it lies, and which devices of this machine can run it."""
    library, reason = load()
    if library is None:
        return {"available": False, "reason": reason}
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_properties(index).name
            devices.append({"name": name, "reason": device_reason(index)})
    return {
        "available": True,
        "library": str(path()),
        "build": library.build_info(),
        "devices": devices,
    }


def lacking(entry: str, op: str, index: int | None = None) -> str:
    """Why neither this device nor this library, whose newest function for `op` is `entry`, runs
    the op; "" where they can."""
    reason = device_reason(index)
    if reason or hasattr(load()[0], entry):
        return reason
    return f"{path().name} predates {op}; rebuild it"


def device_reason(index: int | None = None) -> str:
    """Why a device cannot run the kernels; "" where it can. None: the current device."""
    library, reason = load()
    if library is None:
        return reason
    if torch.version.hip:
        return "this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _device_reason(torch.cuda.current_device() if index is None else index)


@functools.cache
def _device_reason(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    if found.major < 8:
        return (
            f"compute capability {found.major}.{found.minor} is too old; "
            "8.0 and newer are supported"
        )
    shared = int(getattr(found, "shared_memory_per_block_optin", 0))
    if shared < _SHARED_BYTES:
        return f"{found.name} has {shared} bytes of shared memory per block, {_SHARED_BYTES} needed"
    return ""
