"""Which floating-point format a run computes in."""

from __future__ import annotations

import torch


def resolve_precision(requested: str) -> tuple[str, str]:
    """(``fp32`` or ``bf16``, the reason). ``auto`` takes bf16 where the hardware multiplies it."""
    if requested != "auto":
        return requested, "requested"
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU multiplies bf16"
        return "fp32", "the GPU has no bf16 units"
    capabilities = torch.cpu.get_capabilities()
    for unit in ("amx_bf16", "avx512_bf16"):
        if capabilities.get(unit, False):
            return "bf16", f"the CPU has {unit}"
    return "fp32", "the CPU has neither amx_bf16 nor avx512_bf16"


def base_dtype(precision: str) -> torch.dtype:
    """dtype of the frozen base; what trains is kept in fp32 either way."""
    return torch.bfloat16 if precision == "bf16" else torch.float32
