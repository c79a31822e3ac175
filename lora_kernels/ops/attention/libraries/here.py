"""The GPU that a library kernel would run on."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Device:
    index: int
    arch: tuple[int, int]
    hip: bool = False

    @property
    def name(self) -> str:
        return f"cuda:{self.index}"


def device() -> Device | None:
    """The current GPU, or None where torch sees none."""
    if not torch.cuda.is_available():
        return None
    return _device(torch.cuda.current_device())


@functools.cache
def _device(index: int) -> Device:
    return Device(index, torch.cuda.get_device_capability(index), torch.version.hip is not None)


@functools.cache
def load(module: str) -> tuple[Any, str]:
    """(module, "") or (None, why it cannot be imported)."""
    try:
        return importlib.import_module(module), ""
    except Exception as error:  # a package built for another torch raises whatever it likes
        text = " ".join(str(error).split()) or type(error).__name__
        return None, f"{module} cannot be imported: {text[:120]}"


def unknown_arguments(function: Callable[..., Any], names: Iterable[str]) -> str:
    """Why `function` cannot be called with these keywords; empty where it can, or is opaque."""
    schema = getattr(function, "_schema", None)
    if schema is not None:
        known = {a.name for a in schema.arguments}
    else:
        function = getattr(function, "_init_fn", function)  # torch.library.custom_op keeps it there
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):
            return ""
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return ""
        known = set(parameters)
    missing = [name for name in names if name not in known]
    return f"its signature has no {missing[0]}" if missing else ""
