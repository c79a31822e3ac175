"""The cuda backend of quant_linear on CPU tensors: host entries, with emulated kernels."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import emulated_host_entry
import pytest
import torch

from lora_kernels._backends import cuda as loader
from lora_kernels.ops import quantize
from lora_kernels.ops.quant_linear import QuantTensor, cuda, formats, problem

# Names of quantize, and layouts that only checkpoints have.
FORMATS = ("nf4", "fp4", "int8", "int4", "int4_v1", "int4_awq", "fp8_tensor", "fp8_row",
           "fp8_block")  # fmt: skip


def install(monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Lets ``backend="cuda"`` take CPU tensors; returns the emulator of quant_linear's kernels."""
    emulated_host_entry.load("lora_linear")
    operators, dll = emulated_host_entry.load("quant_linear")
    monkeypatch.setattr(loader, "load", lambda: (operators, ""))
    monkeypatch.setattr(cuda, "supports", lambda _: (True, "emulated"))
    problem._choose.cache_clear()
    return dll


def weight(
    n: int, k: int, name: str, block_size: int | None = None, double_quant: bool | None = None
) -> QuantTensor:
    """A quantized random weight, the blocks as given where the format has any."""
    blocks = name in ("nf4", "fp4", "fp8_block") or name.startswith("int4")
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n * 1000 + k))
    kind = "int4" if name == "int4_v1" else name
    q = quantize(w, kind, block_size if blocks else None, double_quant)
    if name != "int4_v1":
        return q
    return QuantTensor(replace(q.spec, layout=formats.GPTQ_V1), q.parts)  # zeros, one larger


def shuffled_groups(q: QuantTensor) -> QuantTensor:
    """The same weight with its columns' groups in another order (act-order)."""
    order = torch.randperm(q.spec.columns, generator=torch.Generator().manual_seed(1))
    return QuantTensor(replace(q.spec, act_order=True), (*q.parts[:3], q.parts[3][order]))
