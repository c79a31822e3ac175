"""Loader of Triton; keeps the reason when it is absent or too old."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
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


def processors(t: torch.Tensor) -> tuple[int, bool]:
    """(multiprocessors, is it AMD's); the interpreter takes the choices of a large device."""
    if t.device.type == "cpu":
        return 132, False
    name, count, _ = architecture(t.device.index or 0)
    return count, name.startswith("gfx")


def precision(dtype: torch.dtype) -> str:
    """Of `tl.dot`: fp32 products in TF32 only where torch's own would be."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def usable(device: str, index: int | None, tensor: str) -> tuple[bool, str]:
    """Can kernels be launched on tensors of that device: ("Triton 3.6.0 kernels", or why not).

    `tensor` is the name of the argument that messages speak of; `index` None: the current GPU.
    """
    module, reason = load()
    if module is None:
        return False, reason
    if device == "cpu":
        if not interpreting():
            return False, (
                f"{tensor} is on cpu; Triton kernels run there with TRITON_INTERPRET=1 only"
            )
        return True, f"the interpreter {module.__version__} kernels"
    if device != "cuda":
        return False, f"{tensor} is on {device}, the kernels work on cuda tensors"
    if interpreting():
        return False, "TRITON_INTERPRET=1 is set, which is for cpu tensors; unset it"
    if not torch.cuda.is_available():
        return False, "torch sees no GPU here"
    name, _, _ = architecture(torch.cuda.current_device() if index is None else index)
    if name.startswith("sm_") and int(name[3:]) < 80:
        return False, f"{name} has no asynchronous copies and no bf16; sm_80 or newer is needed"
    return True, f"Triton {module.__version__} kernels"


def arithmetic(kernel: Any) -> AbstractContextManager[None]:
    """Around launches: in the interpreter the arithmetic of a GPU, otherwise nothing."""
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(kernel, InterpretedFunction):
        return nullcontext()
    from lora_kernels._backends import triton_interpreter

    return triton_interpreter.exact()


def on_device(t: torch.Tensor) -> AbstractContextManager[Any]:
    """Around launches: Triton launches on the current device, and t need not be there."""
    if not t.is_cuda or t.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(t.device)
