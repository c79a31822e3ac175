"""Inputs that use each feature of the capability table, for the tests of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_kernels._backends import cpu
from lora_kernels.ops.attention import capabilities

# Kernels that need a GPU; tests/triton and the emulator run them without one.
ON_GPU = ("triton", "cuda")

# Feature -> arguments of attention_inputs that use it. `varlen` leaves out what it excludes.
CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "causal_unequal": {"causal": True, "Sk": 14},
    "gqa": {"Hk": 2},
    "value_dim": {"Dv": 24},
    "varlen": {"lengths": (3, 0, 17, 1)},
    "window": {"window": (3, 2)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "bool_mask": {"mask": "bool"},
    "additive_mask": {"mask": "additive"},
    "masked_causal": {"mask": "bool", "causal": True},
    "mask_gradient": {"mask": "additive", "mask_shape": (1, 4, 1, 9)},
    "dropout": {"dropout_p": 0.3, "seed": 5},
    "lse_gradient": {"return_lse": True},
    "empty": {"Sk": 0},
    "head_dim": {"D": 24},
    "float32": {"dtype": torch.float32},
    "float64": {"dtype": torch.float64},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
}


def together(first: str, second: str) -> dict[str, Any] | None:
    """Arguments that use both features; None where they exclude each other."""
    a, b = CASES[first], CASES[second]
    masks = {"mask"} & (a.keys() | b.keys())
    if "varlen" in (first, second) and (masks or {"Sk"} & (a.keys() | b.keys())):
        return None
    if any(a[name] != b[name] for name in a.keys() & b.keys()):
        return None
    arguments = {**a, **b}
    if "mask_shape" in arguments and "Sk" in arguments:
        return None  # the shape names the number of keys
    return arguments


def needs_library() -> None:
    """Skips where the compiled CPU library is absent."""
    module, reason = cpu.load()
    if module is None:
        pytest.skip(reason)


def force_path(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Makes aten take `path` wherever the table lets it, and blocks elsewhere."""

    def forced(features: frozenset[str]) -> tuple[str, str]:
        able = not capabilities.lacking(path, features)
        return (path if able else "blocked"), "a test"

    monkeypatch.setattr(capabilities, "aten_path", forced)
