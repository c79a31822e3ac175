"""Inputs of any op on another device."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def moved(value: Any, device: str) -> Any:
    """A copy of `value` with every tensor in it on `device`: dataclasses, lists, tuples and dicts
    are walked through, whatever else has ``to`` is moved."""
    if isinstance(value, Tensor) or (hasattr(value, "to") and not is_dataclass(value)):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        there = {f.name: moved(getattr(value, f.name), device) for f in fields(value)}
        return replace(value, **there)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(v, device) for v in value)
    return {k: moved(v, device) for k, v in value.items()} if isinstance(value, dict) else value
