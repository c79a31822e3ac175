"""Packed copies of frozen weights: made once, dropped when the weight changes or dies.

Price: one copy in the compute dtype for the forward and one for the gradient of x (bf16: 2 + 2
bytes per weight element). Policy, from `LORA_KERNELS_PACK` or :func:`set_pack_policy`:

    auto    keep copies of frozen weights while all copies together stay below the budget
            (`LORA_KERNELS_PACK_BYTES`, default one quarter of the machine's memory)
    always  keep copies of every weight
    never   keep none: each call packs into scratch memory

A copy is valid while storage, offset, shape, strides, version counter and a sample of the values
are unchanged. The sample is there for writes that bypass the version counter (``weight.data``, as
PEFT's merge does it, or NumPy): it notices whole-matrix writes. A write to a few elements that goes
around the version counter is not noticed, as autograd does not notice it either; call
:func:`clear` after one.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lora_kernels._backends import cpu as backend
from lora_kernels.errors import InvalidArgumentError

POLICIES = ("auto", "always", "never")
_GRID = 8


@dataclass
class _Copy:
    packed: Tensor
    storage: StorageWeakRef
    version: int
    sample: Tensor


_copies: OrderedDict[tuple[object, ...], _Copy] = OrderedDict()
_lock = threading.Lock()
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
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def packed_bytes() -> int:
    """Bytes that all kept copies take now."""
    with _lock:
        return sum(c.packed.numel() for c in _copies.values() if not c.storage.expired())


def clear() -> None:
    """Drop every copy."""
    with _lock:
        _copies.clear()


def _sample(weight: Tensor) -> Tensor:
    """A view of about 8 x 8 elements, whatever the strides."""
    (n, k), (row, column) = weight.shape, weight.stride()
    down, across = n // _GRID | 1, k // _GRID | 1
    return weight.as_strided(
        ((n - 1) // down + 1, (k - 1) // across + 1), (row * down, column * across)
    )


def packed_weight(weight: Tensor, dtype: torch.dtype, for_dgrad: bool) -> Tensor:
    """`weight` [N, K] in the engine's layout for X W^T, or for dY W (`for_dgrad`)."""
    module, _ = backend.load()
    assert module is not None
    weight = weight.detach() if weight.requires_grad else weight
    policy = pack_policy()
    if policy == "never":
        return module.lora_linear_pack_weight(weight, dtype, for_dgrad)
    key = (
        weight.untyped_storage()._cdata,
        weight.storage_offset(),
        weight.shape,
        weight.stride(),
        weight.dtype,
        dtype,
        for_dgrad,
        module.lora_linear_engine(dtype),
    )
    sample = _sample(weight)
    with _lock:
        copy = _copies.get(key)
        if copy is not None:
            fresh = not copy.storage.expired() and copy.version == weight._version
            if fresh and torch.equal(copy.sample, sample):
                _copies.move_to_end(key)
                return copy.packed
            del _copies[key]
    packed = module.lora_linear_pack_weight(weight, dtype, for_dgrad)
    with _lock:
        for stale in [k for k, c in _copies.items() if c.storage.expired()]:
            del _copies[stale]
        kept = sum(c.packed.numel() for c in _copies.values())
        if policy == "always" or kept + packed.numel() <= budget_bytes():
            storage = StorageWeakRef(weight.untyped_storage())
            _copies[key] = _Copy(packed, storage, weight._version, sample.clone())
    return packed
