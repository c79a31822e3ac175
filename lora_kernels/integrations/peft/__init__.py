"""PEFT models on fused layers: :func:`apply`, :func:`unapply` and the :func:`applied` context."""

from __future__ import annotations

try:
    import peft as _peft  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lora_kernels.apply needs peft, which is not installed; pip install 'lora-kernels[hf]'"
    ) from error

from lora_kernels.integrations.peft.conversion import applied, apply, unapply
from lora_kernels.integrations.peft.linear import FusedLoraLinear
from lora_kernels.integrations.peft.report import ApplyReport

__all__ = ["ApplyReport", "FusedLoraLinear", "applied", "apply", "unapply"]
