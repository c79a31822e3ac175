"""Loader of the compiled CPU library; keeps the reason when it is absent."""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch

from lora_kernels.errors import InvalidArgumentError


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """(module, "") or (None, reason). Importing it loads libtorch symbols, so torch comes first."""
    try:
        from lora_kernels import _C
    except ImportError as error:
        if "cannot import name '_C'" in str(error) or "No module named" in str(error):
            return None, "lora_kernels._C is not built (pip install --no-build-isolation builds it)"
        return None, f"lora_kernels._C cannot be loaded: {error}"
    if torch.__version__ != _C.torch_version:
        return None, (
            f"lora_kernels._C was built for torch {_C.torch_version} but torch "
            f"{torch.__version__} is installed; rebuild it"
        )
    try:
        _C.isa()
    except ValueError as error:
        given = os.environ.get("LORA_KERNELS_CPU_ISA", "")
        raise InvalidArgumentError(f"LORA_KERNELS_CPU_ISA={given!r}: {error}") from None
    return _C, ""


def lacking(
    entry: str, op: str, operand: str, device: str, dtype: torch.dtype | None = None
) -> str:
    """Why `op`, whose newest function in the library is `entry`, cannot run on its `operand` of
    this device and dtype (None: not asked); empty when it can."""
    if device != "cpu":
        return f"{operand} is on {device}, the library works on cpu tensors"
    module, reason = load()
    if module is None:
        return reason
    if not hasattr(module, entry):
        return f"lora_kernels._C predates {op}; rebuild it"
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {dtype} is not supported; float32, bfloat16 and float16 are"
    return ""


def broken() -> bool:
    """Built, but not usable: something that should work does not."""
    module, reason = load()
    return module is None and "is not built" not in reason


def build_info() -> dict[str, Any]:
    """What was built, and what of it this machine can run."""
    module, reason = load()
    if module is None:
        return {"available": False, "reason": reason}
    return {
        "available": True,
        "torch": module.torch_version,
        "compiler": module.compiler,
        "isa": module.isa(),
        "machine_isas": module.machine_isas(),
    }
