"""Fixtures of the CPU kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lora_kernels._backends import cpu

library, _ = cpu.load()


@pytest.fixture(params=library.machine_isas() if library is not None else ["none"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the machine in turn."""
    if library is None:
        pytest.skip("lora_kernels._C is not built")
    library.set_isa_limit(request.param)
    yield request.param
    library.set_isa_limit("")


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
