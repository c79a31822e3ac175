"""A fallback is never silent: one warning per reason and process, or an error when strict."""

from __future__ import annotations

import logging

import torch

from lora_kernels.errors import StrictFallbackError
from lora_kernels.ops import _dispatch

_logger = logging.getLogger("lora_kernels")
_warned: set[str] = set()


def warn_once(reason: str, message: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        _logger.warning("%s", message)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def call_falls_back(reason: str) -> bool:
    """Note that one call of a fused layer takes PEFT's own path. Runs at trace time when compiled.

    Raises:
        StrictFallbackError: ``LORA_KERNELS_STRICT=1``.
    """
    if _dispatch.strict():
        raise StrictFallbackError(
            f"a LoRA layer would run PEFT's own forward: {reason}; "
            "unset LORA_KERNELS_STRICT to allow it"
        )
    warn_once(reason, f"PEFT's own forward runs where a fused one could not: {reason}")
    return True
