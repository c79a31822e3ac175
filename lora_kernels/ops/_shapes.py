"""Keywords of `lk.explain`, checked before a problem is made of them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from lora_kernels.errors import InvalidArgumentError


def check_names(
    problem: Any, shapes: dict[str, Any], needed: tuple[str, ...], also: tuple[str, ...] = ()
) -> None:
    """Every keyword is a field of the dataclass `problem` or one of `also`, and `needed` are there.

    Raises:
        InvalidArgumentError: the first that is unknown, else the first that is missing.
    """
    known = {f.name for f in fields(problem)} | set(also)
    unknown = sorted(set(shapes) - known)
    if unknown:
        raise InvalidArgumentError(
            f"unknown argument {unknown[0]!r}; accepted: {', '.join(sorted(known))}"
        )
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise InvalidArgumentError(
            f"argument {missing[0]!r} is missing; needed: {', '.join(needed)}"
        )


def read_dtype(
    shapes: dict[str, Any], accepted: tuple[torch.dtype, ...], name: str = "dtype"
) -> None:
    """A dtype that was given, by its name or as such, becomes a torch.dtype in place.

    Raises:
        InvalidArgumentError: it is none of `accepted`.
    """
    if name not in shapes:
        return
    given = shapes[name]
    if isinstance(given, str):
        shapes[name] = getattr(torch, given.removeprefix("torch."), None)
    if shapes[name] not in accepted:
        raise InvalidArgumentError(
            f"{name}={given!r} is not supported; accepted: "
            + ", ".join(str(d).removeprefix("torch.") for d in accepted)
        )
