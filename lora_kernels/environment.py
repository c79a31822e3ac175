"""What this installation can run on this machine, and why not the rest: `lora-kernels env`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from lora_kernels._backends import cpu as cpu_library
from lora_kernels._backends import cuda as cuda_library
from lora_kernels._version import __version__
from lora_kernels.errors import LoraKernelsError
from lora_kernels.ops import explain
from lora_kernels.ops._registry import OPS
from lora_kernels.ops.lora_linear import budget_bytes, pack_policy, packed_bytes
from lora_kernels.selfcheck import GPU_BACKENDS, TYPICAL, self_check

PACKAGES = ("torch", "triton", "peft", "transformers", "accelerate", "safetensors",
            "torchmetrics", "matplotlib", "PyYAML", "numpy")  # fmt: skip
_PREFIX = "LORA_KERNELS_"


def env() -> dict[str, Any]:
    """Everything a bug report needs; prints nothing and changes nothing.

    Returns:
        ``lora_kernels``: version; ``status``: ``ok`` or ``broken``; ``problems``: a line for each
        thing that should work and does not; ``platform``, ``cpu``, ``gpu``, ``native`` and
        ``cuda`` (the two compiled libraries), ``packing`` (policy and bytes of packed weights in
        this process), ``packages`` (None where absent), ``environment`` (the variables that are
        set), ``ops``: per op the choice of
        `auto` for typical shapes, and per backend ``{"available", "reason", "self_check"}``,
        where the last is ``ok``, an error, or None when the backend is not available.
    """
    problems: list[str] = []
    native, packing = _native(problems), _packing(problems)
    ops = {spec.name: _op(spec.name, spec.backends, problems) for spec in OPS}
    return {
        "lora_kernels": __version__,
        "status": "broken" if problems else "ok",
        "problems": problems,
        "platform": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "folder": str(Path(__file__).parent),
        },
        "cpu": _cpu(),
        "gpu": _gpu(),
        "native": native,
        "cuda": _cuda(problems),
        "packing": packing,
        "ops": ops,
        "packages": {name: _version(name) for name in PACKAGES},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_PREFIX)},
    }


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cpu() -> dict[str, Any]:
    capabilities = torch.cpu.get_capabilities()
    units = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "amx_fp16")
    return {
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "units": [unit for unit in units if capabilities.get(unit, False)],
    }


def _gpu() -> dict[str, Any]:
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        devices = [
            {"name": p.name, "capability": f"{p.major}.{p.minor}", "bytes": p.total_memory}
            for p in found
        ]
        return {"devices": devices, "reason": ""}
    toolkit = torch.version.cuda or torch.version.hip
    why = f"torch sees no GPU (built for {toolkit})" if toolkit else "torch is built without CUDA"
    return {"devices": [], "reason": why}


def _native(problems: list[str]) -> dict[str, Any]:
    """The compiled CPU module: absent is fine, present and not usable is a problem."""
    info = cpu_library.build_info()
    if cpu_library.broken():
        problems.append(info["reason"])
    return info


def _cuda(problems: list[str]) -> dict[str, Any]:
    """The compiled CUDA library, likewise."""
    info = cuda_library.build_info()
    if cuda_library.broken():
        problems.append(info["reason"])
    return info


def _packing(problems: list[str]) -> dict[str, Any]:
    try:
        return {"policy": pack_policy(), "bytes": packed_bytes(), "budget_bytes": budget_bytes()}
    except LoraKernelsError as e:
        problems.append(str(e))
        return {"policy": None, "bytes": packed_bytes(), "budget_bytes": None}


def _op(name: str, backends: tuple[str, ...], problems: list[str]) -> dict[str, Any]:
    answers: dict[str, Any] = {"auto": {}, "backends": {}}
    try:
        for dtype, shapes in TYPICAL[name].items():
            choice = explain(name, **shapes)
            answers["auto"][dtype] = {k: choice[k] for k in ("backend", "reason")}
        supported = choice["backends"]
    except LoraKernelsError as e:
        problems.append(f"{name}: {e}")
        supported = explain(name, backend="reference", **shapes)["backends"]
    _ask_gpu(name, backends, answers, supported, problems)
    for backend in backends:
        able, reason = supported[backend]["supported"], supported[backend]["reason"]
        checked = self_check(name, backend) if able else None
        if checked not in (None, "ok"):
            problems.append(f"{name}, backend {backend}: self-check failed: {checked}")
        answers["backends"][backend] = {
            "available": able,
            "reason": reason,
            "self_check": checked,
        }
    return answers


def _ask_gpu(
    name: str, backends: tuple[str, ...], answers: dict[str, Any], supported: dict[str, Any],
    problems: list[str],
) -> None:  # fmt: skip
    """Where there is a GPU: what `auto` takes on it, and what its backends say of its tensors."""
    own = [b for b in backends if b in GPU_BACKENDS]
    if not own or not torch.cuda.is_available():
        return
    try:
        for dtype, shapes in TYPICAL[name].items():
            choice = explain(name, device="cuda", **shapes)
            kept = {k: choice[k] for k in ("backend", "reason")}
            answers["auto"][f"{dtype} on the GPU"] = kept
        supported |= {b: choice["backends"][b] for b in own}
    except LoraKernelsError as e:
        problems.append(f"{name} on the GPU: {e}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
