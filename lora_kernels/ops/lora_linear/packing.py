"""Packed copies of frozen weights: made once, dropped when the weight changes or dies.

Price: one copy in the compute dtype for the forward and one for the gradient of x (bf16: 2 + 2
bytes per weight element). Policy, from `LORA_KERNELS_PACK` or :func:`set_pack_policy`:

    auto    keep copies of frozen weights while all copies together stay below the budget
            (`LORA_KERNELS_PACK_BYTES`, default one quarter of the memory of the machine or
            container) and an eighth of the machine's memory is left available
    always  keep copies of every weight
    never   keep none: each call packs into scratch memory

The library keeps the copies (csrc/lora_linear/packed_copies.h). One is valid while storage,
offset, shape, strides, version counter and a sample of the values are unchanged. The sample is
there for writes that bypass the version counter (``weight.data``, as PEFT's merge does it, or
NumPy): it notices whole-matrix writes. A write to a few elements that goes around the version
counter is not noticed, as autograd does not notice it either; call :func:`clear` after one.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels._backends import cpu as backend
from lora_kernels.errors import InvalidArgumentError

POLICIES = ("auto", "always", "never")
_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_MEMORY = Path("/proc/meminfo")

_policy: str | None = None


def pack_policy() -> str:
    """The policy in force: the one set, else ``LORA_KERNELS_PACK``, else ``auto``."""
    policy = _policy or os.environ.get("LORA_KERNELS_PACK", "") or "auto"
    if policy not in POLICIES:
        raise InvalidArgumentError(
            f"LORA_KERNELS_PACK={policy!r} is not a policy; accepted: {', '.join(POLICIES)}"
        )
    return policy


def set_pack_policy(policy: str | None) -> None:
    """Set the policy for this process; None returns to the environment's. Copies are dropped."""
    global _policy
    if policy is not None and policy not in POLICIES:
        raise InvalidArgumentError(
            f"policy={policy!r} is not a policy; accepted: {', '.join(POLICIES)}"
        )
    _policy = policy
    clear()


def budget_bytes() -> int:
    """Most bytes that `auto` keeps."""
    value = os.environ.get("LORA_KERNELS_PACK_BYTES", "")
    if value:
        if not value.isdigit():
            raise InvalidArgumentError(
                f"LORA_KERNELS_PACK_BYTES={value!r} is not a number of bytes; accepted: an integer"
            )
        return int(value)
    return _memory_bytes() // 4


@functools.cache
def _memory_bytes() -> int:
    """Of the machine, or of the control group that this process is in, if that is less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits = [_CGROUPS / "memory" / "memory.limit_in_bytes"]
    for line in _words(_OWN_CGROUP):
        _, _, path = line.partition("::/")
        inside = _CGROUPS / path
        limits += [folder / "memory.max" for folder in (inside, *inside.parents)]
    found += [int(word) for limit in limits for word in _words(limit) if word.isdigit()]
    return min(found)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _room() -> int:
    """Bytes that copies may grow to now: the budget, less where memory runs out."""
    words = _words(_MEMORY)
    if "MemAvailable:" not in words:
        return budget_bytes()
    total, available = (
        1024 * int(words[words.index(name) + 1]) for name in ("MemTotal:", "MemAvailable:")
    )
    return min(budget_bytes(), max(0, packed_bytes() + available - total // 8))


def packed_bytes() -> int:
    """Bytes that all kept copies take now."""
    module, _ = backend.load()
    return 0 if module is None else module.lora_linear_packed_copies_bytes()


def clear() -> None:
    """Drop every copy."""
    module, _ = backend.load()
    if module is not None:
        module.lora_linear_drop_packed_copies()


def packed_weight(weight: Tensor, dtype: torch.dtype, for_dgrad: bool) -> Tensor:
    """`weight` [N, K] in the engine's layout for X W^T, or for dY W (`for_dgrad`)."""
    module, _ = backend.load()
    assert module is not None
    policy = pack_policy()
    if policy != "never":
        copy = module.lora_linear_packed_copy(weight, dtype, for_dgrad)
        if copy is not None:
            return copy
    packed = module.lora_linear_pack_weight(weight.detach(), dtype, for_dgrad)
    if policy != "never":
        budget = -1 if policy == "always" else _room()
        module.lora_linear_keep_packed_copy(weight, dtype, for_dgrad, packed, budget)
    return packed
