"""The cuda backend of attention on CPU tensors: its host entry, its kernels in the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import emulated_host_entry
import pytest

from lora_kernels._backends import cuda as loader
from lora_kernels.ops.attention import capabilities, cuda
from lora_kernels.ops.attention.problem import AttentionProblem

LARGE, SMALL = 163 << 10, 99 << 10  # shared memory per block: sm_80; sm_86, sm_89, sm_120
FAULTS = {
    "fragment_order": 1, "missing_barrier": 2, "missing_wait": 3, "shifted_mask": 4,
    "window_edge": 5,
}  # fmt: skip


def _supports(problem: AttentionProblem) -> tuple[bool, str]:
    """What cuda.supports says about a GPU that can run the kernels."""
    lacking = capabilities.lacking("cuda", problem.features())
    return not lacking, lacking or "emulated"


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """backend="cuda" runs in the emulator; the value sets its options."""
    library, dll = emulated_host_entry.load("attention")
    monkeypatch.setattr(loader, "load", lambda: (library, ""))
    monkeypatch.setattr(cuda, "supports", _supports)
    dll.lk_clear_memory()
    dll.lk_options(0, 0, LARGE)
    yield dll
    dll.lk_options(0, 0, LARGE)
