"""Loader of Triton; keeps the reason when it is absent or too old."""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch

OLDEST = (3, 6)


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """(triton, "") or (None, reason)."""
    try:
        import triton
    except ImportError as error:
        if error.name == "triton":
            return None, "triton is not installed (pip install 'lora-kernels[triton]')"
        return None, f"triton cannot be imported: {error}"
    version = str(triton.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return None, f"triton {version} is too old; {OLDEST[0]}.{OLDEST[1]} or newer is needed"
    return triton, ""


def interpreting() -> bool:
    """Are kernels run by Triton's interpreter, on the CPU. Set TRITON_INTERPRET=1 before the first
    kernel is imported; it holds for the whole process."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "on", "yes", "true")


def build_info() -> dict[str, Any]:
    """Version and mode, or the reason why there is no Triton."""
    module, reason = load()
    if module is None:
        return {"available": False, "reason": reason}
    return {"available": True, "triton": module.__version__, "interpreter": interpreting()}


@functools.cache
def architecture(index: int) -> tuple[str, int, int]:
    """(``sm_90`` or ``gfx942``, multiprocessors, bytes of shared memory or 0) of a GPU."""
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = str(found.gcnArchName).split(":")[0]
    else:
        name = f"sm_{found.major}{found.minor}"
    shared = int(getattr(found, "shared_memory_per_block_optin", 0))
    return name, found.multi_processor_count, shared
