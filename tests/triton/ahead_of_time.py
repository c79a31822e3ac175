"""Compile what a launch would run, for any GPU, without one: a driver that only knows its target.

The host code of an op runs on CPU tensors, its kernels replaced by :class:`Recorder`, so each
compilation sees the very arguments, and so the specialisation on strides and alignment, of a
launch.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import launcher
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 108),
    "sm_90": (GPUTarget("cuda", 90, 32), 132),
    "sm_100": (GPUTarget("cuda", 100, 32), 148),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 304),
}
SMALLEST_SHARED = 65536  # bytes that a program may have on every one of them

_SPILLS: dict[str, int] = {}  # the same machine code is read once


class TargetDriver:
    """What JITFunction.warmup asks of a driver."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def compile_for(name: str) -> None:
    driver.set_active(TargetDriver(TARGETS[name][0]))


@dataclass
class Compiled:
    """One kernel that was compiled, and what its machine code holds."""

    kernel: str
    compiled: Any
    constants: dict[str, Any] = field(default_factory=dict)

    @property
    def shared(self) -> int:
        return int(self.compiled.metadata.shared)

    @property
    def is_cuda(self) -> bool:
        return "cubin" in self.compiled.asm

    def _dump(self, *options: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.compiled.asm["cubin"])
            file.flush()
            done = subprocess.run(
                [str(TOOLS / "cuobjdump"), *options, file.name],
                capture_output=True, text=True, check=True,
                env={**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}"},
            )  # fmt: skip
        return done.stdout

    @cached_property
    def opcodes(self) -> Counter[str]:
        pattern = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)"
        return Counter(re.findall(pattern, self._dump("-sass")))

    def suffixes(self, opcode: str) -> set[str]:
        """What follows an opcode in the SASS: widths, scopes."""
        return set(re.findall(rf"\b{opcode}\.([A-Z0-9_.]+)", self._dump("-sass")))

    @cached_property
    def registers_and_stack(self) -> tuple[int, int]:
        found = re.search(r"REG:(\d+) STACK:(\d+)", self._dump("-res-usage"))
        assert found is not None
        return int(found[1]), int(found[2])

    def spills(self) -> int:
        """Bytes of stack and instructions that move registers to and from it."""
        if self.compiled.hash not in _SPILLS:
            _SPILLS[self.compiled.hash] = self._spills()
        return _SPILLS[self.compiled.hash]

    def _spills(self) -> int:
        if self.is_cuda:
            code = self.opcodes
            return self.registers_and_stack[1] + code["LDL"] + code["STL"]
        text = self.compiled.asm["amdgcn"]
        counts = re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", text)
        stack = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text)
        assert counts and stack
        return sum(map(int, counts + stack))

    def __str__(self) -> str:
        shown = {k: v for k, v in self.constants.items() if k != "PRECISION"}
        return f"{self.kernel} {shown}"


@dataclass(frozen=True)
class Launch:
    """What a launch was called with; :meth:`compile` makes the kernel for it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def compile(self) -> Compiled:
        made = self.kernel.warmup(*self.args, grid=self.grid, **self.options)
        return Compiled(self.name, made, self.options)


def _light(arg: Any) -> Any:
    """The argument as far as compilation looks at it: of a tensor, dtype and alignment."""
    if isinstance(arg, tuple):
        return tuple(_light(a) for a in arg)
    if isinstance(arg, torch.Tensor) and arg.data_ptr() % 16 == 0:
        return torch.empty(1, dtype=arg.dtype)
    return arg


class Collector:
    """Stands in for a kernel: `kernel[grid](*args)` is noted, and compiled later if at all."""

    def __init__(self, kernel: Any, found: list[Launch]) -> None:
        self.kernel, self.found = kernel, found
        kernel.device_caches.clear()  # it holds the target of the driver before

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.found.append(Launch(self.kernel, grid, _light(args), options))

        return launch


class Recorder:
    """Stands in for a kernel: `kernel[grid](*args)` compiles it and keeps the result."""

    def __init__(self, kernel: Any, found: list[Compiled]) -> None:
        self.kernel, self.found = kernel, found
        kernel.device_caches.clear()  # it holds the target of the driver before

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            made = self.kernel.warmup(*args, grid=grid, **options)
            self.found.append(Compiled(self.kernel.fn.__name__, made, options))

        return launch


def recorders(target: str, kernels: Sequence[Any]) -> tuple[list[Compiled], list[Recorder]]:
    """(what launches will have compiled for `target`, a stand-in of each kernel)."""
    compile_for(target)
    found: list[Compiled] = []
    return found, [Recorder(kernel, found) for kernel in kernels]


def matrix(rows: int, columns: int, dtype: torch.dtype, layout: str = "rows") -> torch.Tensor:
    """Without memory; `layout` says whose elements lie side by side."""
    if layout == "columns":
        return torch.empty(columns, rows, dtype=dtype, device="meta").t()
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def assert_fits(found: Iterable[Compiled], most_shared: int = SMALLEST_SHARED) -> None:
    """No spills, and no more shared memory than that."""
    wrong = []
    for made in {id(c.compiled): c for c in found}.values():
        if made.shared > most_shared:
            wrong.append(f"{made}: {made.shared} bytes of shared memory, not {most_shared}")
        if made.spills():
            wrong.append(f"{made}: spills {made.spills()}")
    assert not wrong, "\n".join(wrong)


def assert_no_tensor_maps(found: Iterable[Compiled]) -> None:
    """The glue code of a launch can be made, and passes none."""
    for made in found:
        if made.is_cuda:
            assert launcher.tensor_maps(made.compiled) == 0, made
