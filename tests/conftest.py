"""Fixtures of every test: the registry's backends and a fixed seed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_kernels.ops import _registry
from lora_kernels.testing import LoraLinearInputs

torch.manual_seed(20211017)  # tensors of test modules, and ids made of them, agree in every process
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are not installed


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(20211017)


@pytest.fixture(params=_registry.find("lora_linear").backends)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that the registry names for lora_linear."""
    return request.param


@pytest.fixture
def require(backend: str) -> Callable[[LoraLinearInputs], None]:
    """Skips, with the backend's own reason, what it does not support."""

    def check(inputs: LoraLinearInputs) -> None:
        spec = _registry.find("lora_linear")
        able, why = spec.supports(backend, spec.problem(**problem_shapes(inputs)))
        if not able:
            pytest.skip(f"{backend}: {why}")

    return check


def problem_shapes(inputs: LoraLinearInputs) -> dict[str, object]:
    return {
        "M": inputs.x.shape[:-1].numel(),
        "K": inputs.x.shape[-1],
        "N": tuple(w.shape[0] for w in inputs.weights),
        "rank": tuple(a.shape[0] for a in inputs.lora_as),
        "dtype": inputs.x.dtype,
        "weight_dtype": inputs.weights[0].dtype,
        "dropout_p": inputs.dropout_p,
    }
