"""Which floating-point format a run computes in."""

from __future__ import annotations

import torch

from lora_kernels.errors import ConfigError


def resolve_precision(requested: str, device: str = "auto") -> tuple[str, str]:
    """(precision, the reason). ``auto`` takes bf16 where the hardware multiplies it."""
    if requested != "auto":
        return requested, "requested"
    if device != "cpu" and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU multiplies bf16"
        return "fp32", "the GPU has no bf16 units"
    capabilities = torch.cpu.get_capabilities()
    for unit in ("amx_bf16", "avx512_bf16"):
        if capabilities.get(unit, False):
            return "bf16", f"the CPU has {unit}"
    return "fp32", "the CPU has neither amx_bf16 nor avx512_bf16"


def base_dtype(precision: str, method: str = "lora") -> torch.dtype:
    """dtype that the base is loaded in; what trains is kept in fp32 except in ``bf16-weights``.

    Under method full everything trains, so nothing is loaded in less.
    """
    if precision == "bf16-weights" or (precision == "bf16" and method != "full"):
        return torch.bfloat16
    return torch.float32


def check_device(requested: str) -> str:
    """``cpu`` or ``cuda``.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    present = torch.cuda.is_available()
    if requested == "cuda" and not present:
        built = "torch sees none" if torch.backends.cuda.is_built() else "this torch has no CUDA"
        raise ConfigError(f"device='cuda' needs a GPU and {built}; accepted here: auto, cpu")
    return "cuda" if present and requested != "cpu" else "cpu"
