"""The host entry of an op (csrc/<op>/cuda/<op>_cuda.cpp), compiled for CPU tensors and linked with
its kernels in the emulator: everything of _cuda.so that needs no GPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from pathlib import Path
from typing import Any

import emulator_library
import pytest
import torch

LARGE = 163 << 10  # shared memory per block of sm_80


@functools.cache
def load(op: str, *others: str) -> tuple[Any, ctypes.CDLL]:
    """(torch.ops.lora_kernels_emulated with the operators of `op`, the emulator they run on).
    `others`: ops beside lora_linear whose kernels the entry calls."""
    compiler = emulator_library.compiler()
    if compiler is None:
        pytest.skip("no C++ compiler; install g++ or set CXX")
    own = emulator_library.CSRC.parent / f"tests/csrc/{op}_host_entry_emulated.cpp"
    kernels = emulator_library.build(op, *others)
    library = kernels.with_name(f"{op}-{_digest(own, kernels)}.so")
    if not library.exists():
        folder = Path(torch.__file__).parent
        command = [
            compiler, "-shared", "-fPIC", "-fvisibility=hidden", "-O1", "-std=c++17",
            "-DLK_EMULATOR", "-DTORCH_TARGET_VERSION=0x020b000000000000",
            '-DLK_NVCC_VERSION="none"', '-DLK_CUDA_TARGETS="emulator"',
            f"-I{emulator_library.CSRC}", f"-isystem{folder / 'include'}",
            f"-isystem{folder / 'include/torch/csrc/api/include'}", str(own), str(kernels),
            "-Wl,--no-as-needed", f"-L{folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10",
            f"-Wl,-rpath,{kernels.parent}",
        ]  # fmt: skip
        emulator_library.make(library, command)
    torch.ops.load_library(str(library))
    dll = emulator_library.load(op, *others)
    dll.lk_options(0, 0, LARGE)
    dll.lk_clear_memory()
    return torch.ops.lora_kernels_emulated, dll


def _digest(entry: Path, kernels: Path) -> str:
    total = hashlib.sha256(f"{kernels.name} {torch.__version__}".encode())
    for path in emulator_library.with_headers(entry):
        total.update(path.read_bytes())
    return total.hexdigest()[:16]
