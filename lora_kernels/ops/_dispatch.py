"""Which backend runs a problem, and why. No op is named here; each op passes its own predicates."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from lora_kernels._backends import cpu as cpu_library
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


def resolve_once(
    op: str, requested: str, preference: tuple[str, ...], supports: Any, problem: Any
) -> tuple[str, str]:
    """:func:`resolve` for a problem on the CPU, or one that asks for a backend by name, remembered
    for further calls; `supports(name, problem)`."""
    module, _ = cpu_library.load()
    isa = "" if module is None else module.isa()
    disabled_now = os.environ.get("LORA_KERNELS_DISABLE", "")
    return _resolved(op, requested, preference, supports, problem, disabled_now, isa)


@functools.lru_cache(maxsize=4096)
def _resolved(
    op: str, requested: str, preference: tuple[str, ...], supports: Any, problem: Any,
    disabled_now: str, isa: str,
) -> tuple[str, str]:  # fmt: skip
    """The last two serve the key alone."""
    return resolve(op, requested, preference, lambda name: supports(name, problem))


@functools.cache
def backend_module(op: str, name: str) -> ModuleType:
    """The module of a backend that `resolve` has named."""
    return importlib.import_module(f"lora_kernels.ops.{op}.{name}")
