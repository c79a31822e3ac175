"""Poisoned allocations: memory that an op forgets to write shows up as NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, every uninitialised tensor is filled first: NaN, or the largest integer.

    Covers ``torch.empty``, ``empty_like``, ``new_empty`` and ``empty_strided`` from Python and
    ``at::empty`` from C++, for every device, through torch's own debugging switch. That switch
    works together with deterministic algorithms, so these are switched on as well; both are put
    back at the end. Memory that C++ takes from an allocator directly is not covered.
    """
    switch: Any = torch.utils.deterministic
    fill = switch.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    switch.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        switch.fill_uninitialized_memory = fill
