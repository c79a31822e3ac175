"""The cuda backend of attention on CPU tensors: its host entry, its kernels in the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import emulated_host_entry
import pytest
import torch
from torch import Tensor

from lora_kernels._backends import cuda as loader
from lora_kernels.ops import attention
from lora_kernels.ops.attention import capabilities, cuda
from lora_kernels.ops.attention.problem import AttentionProblem
from lora_kernels.testing.attention import AttentionInputs

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


def with_fault(
    emulator: ctypes.CDLL, i: AttentionInputs, options: tuple[int, int, int]
) -> dict[str, Tensor]:
    """The output, and the gradients, each with the planted fault of `options` (schedule, fault,
    shared memory) in their own kernels alone: the backward follows a forward without it."""
    schedule, fault, shared = options
    named = {n: t.detach().requires_grad_() for n, t in i.leaves().items()}
    emulator.lk_options(schedule, fault, shared)
    with torch.no_grad():
        wrong = attention(**named, backend="cuda", **i.options)
    emulator.lk_options(schedule, 0, shared)
    out = attention(**named, backend="cuda", **i.options)
    emulator.lk_options(schedule, fault, shared)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    out.backward(dout)
    return {"out": wrong, **{f"d{n}": t.grad for n, t in named.items()}}
