"""Which backend runs a problem, and why. No op is named here; each op passes its own predicates."""

from __future__ import annotations

import os
from collections.abc import Callable

from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError

BACKENDS = ("reference", "aten", "cpu", "triton", "cuda")
Supports = Callable[[str], "tuple[bool, str]"]


def requested_backend(backend: str | None) -> str:
    """The caller's choice, else ``LORA_KERNELS_BACKEND``, else ``auto``; checked."""
    source, name = "backend", backend
    if name is None:
        source, name = "LORA_KERNELS_BACKEND", os.environ.get("LORA_KERNELS_BACKEND", "") or "auto"
    if name != "auto" and name not in BACKENDS:
        raise InvalidArgumentError(
            f"{source}={name!r} is not a backend; accepted: auto, {', '.join(BACKENDS)}"
        )
    return name


def disabled(op: str, backend: str) -> bool:
    """``LORA_KERNELS_DISABLE`` lists ops, backends or op:backend pairs, comma separated."""
    names = {n.strip() for n in os.environ.get("LORA_KERNELS_DISABLE", "").split(",")}
    return bool(names & {op, backend, f"{op}:{backend}"})


def strict() -> bool:
    return os.environ.get("LORA_KERNELS_STRICT", "") not in ("", "0")


def resolve(
    op: str, requested: str, preference: tuple[str, ...], supports: Supports
) -> tuple[str, str]:
    """(backend, reason). A request by name never falls back: it runs or raises.

    `preference` is the order in which `auto` tries; `supports(name)` must already say no to a
    path that could lose to `aten`, with the reason. `aten` is the floor and always supported.
    """
    if requested != "auto":
        able, why = supports(requested)
        if not able:
            raise BackendUnavailableError(
                f"{op}: backend={requested!r} cannot run this problem: {why}"
            )
        return requested, "requested"
    passed_over = []
    for name in preference:
        if disabled(op, name):
            passed_over.append(f"{name}: disabled by LORA_KERNELS_DISABLE")
            continue
        able, why = supports(name)
        if able:
            return name, "; ".join([why, *passed_over]) if why else "; ".join(passed_over)
        passed_over.append(f"{name}: {why}")
    return "aten", "; ".join(passed_over) or "library GEMMs"
