"""Backends run outside of autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING: AbstractContextManager[object] = nullcontext()


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """The caller has settled every dtype; an autocast region must not change the inner products.
    Leaving one costs more than asking whether there is one."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING
