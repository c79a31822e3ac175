"""Fixtures of every test: the registry's backends and a fixed seed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_kernels.ops import _registry
from lora_kernels.testing import LoraLinearInputs

# Files of few tests that take minutes: two workers begin with them and share the rest afterwards.
LONGEST = ("triton/test_compiled.py", "triton/test_interpreted.py")

torch.manual_seed(20211017)  # tensors of test modules, and ids made of them, agree in every process
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are not installed


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # of xdist: files with the fewest tests last
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The order of files for the workers of xdist: the longest, then those with the most tests."""
    if not hasattr(config, "workerinput"):
        return
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (not item.path.as_posix().endswith(LONGEST), -tests[item.path]))


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
