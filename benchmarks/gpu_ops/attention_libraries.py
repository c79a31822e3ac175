"""attention's `aten` held to one library's kernel: what gpu-check proves and times of each.

A provider ``aten-<library>`` runs the op with LORA_KERNELS_ATEN_ATTENTION naming the library, in
both directions; a problem that the library cannot run is skipped with the reason. FlexAttention is
left out: its kernel is timed by itself, and compiling it for every case takes too long.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from benchmarks.gpu_ops.row import Work
from benchmarks.peers import UnavailableError
from lora_kernels.ops.attention import libraries
from lora_kernels.ops.attention.libraries import decode, table
from lora_kernels.ops.attention.problem import AttentionProblem

PREFIX = "aten-"
PROVIDERS = tuple(PREFIX + library for library in table.ORDER)
NOT_DETERMINISTIC = ("cudnn",)  # called so, as it is not


def library_of(provider: str) -> str | None:
    return provider.removeprefix(PREFIX) if provider in PROVIDERS else None


@contextmanager
def taking(library: str) -> Iterator[None]:
    """`aten` takes this library or raises."""
    before = os.environ.get(libraries.VARIABLE)
    os.environ[libraries.VARIABLE] = library
    try:
        yield
    finally:
        if before is None:
            del os.environ[libraries.VARIABLE]
        else:
            os.environ[libraries.VARIABLE] = before


def need(library: str, problem: AttentionProblem) -> None:
    """UnavailableError where the library cannot run it, in either direction."""
    with taking(library):
        if problem.cache:
            if library not in decode.ORDER:
                raise UnavailableError(f"{library} is not called with a cache")
            chosen, why = decode.choose(problem)
            if chosen is None:
                raise UnavailableError(why)
            return
        for direction in ("fwd", "bwd"):
            able, why = libraries.explain(problem, direction)
            if not able:
                raise UnavailableError(why)


@dataclass(frozen=True)
class LibraryWork(Work):
    """Forward and backward with the library named."""

    library: str = ""

    def _grad(self, outs: tuple[Tensor, ...], keep: bool) -> tuple[Tensor, ...]:
        with taking(self.library):
            return super()._grad(outs, keep)
