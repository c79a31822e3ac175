"""lora_linear on a GPU against the frozen layer, PEFT and other projects' kernels.

Every provider is checked against an fp64 oracle on the device before it is timed. Times are
between two events around several calls in a row, providers take turns, and each turn starts with
a cold second-level cache. The ceilings (a large copy, a large product) belong to the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks import providers
from benchmarks.gate import Gate
from benchmarks.peers import UnavailableError
from benchmarks.providers import BASELINE, Case, Provider
from benchmarks.timing import DeviceClock, Timed, Timing, measure
from lora_kernels.ops import _evidence, _registry
from lora_kernels.testing import BudgetExceededError

Announce = Callable[[str, Case], None]
MODES = ("fwd", "bwd", "fwdbwd")
DEFAULT = (
    "frozen", "peft", "peft-fp32", "peft-compile", "unsloth", "lorafusion", "liger",
    "aten", "aten-padded", "triton", "cuda", "aten-fp32", "triton-fp32", "cuda-fp32",
)  # fmt: skip
_BASE = Case(8192, 4096, 4096, 16, torch.bfloat16, device="cuda")
# In the order of what is missed most when the time is up.
CASES = (
    _BASE,
    replace(_BASE, N=14336),
    replace(_BASE, K=14336),
    replace(_BASE, dropout_p=0.1),
    replace(_BASE, others=(1024, 1024)),
    replace(_BASE, K=8192, N=8192),
    replace(_BASE, N=14336, others=(14336,)),
    replace(_BASE, rank=64),
    replace(_BASE, M=2048),
    replace(_BASE, others=(1024, 1024), dropout_p=0.1),
    replace(_BASE, dtype=torch.float16),
    replace(_BASE, M=2048, K=2048, N=2048),
)
# Compiling takes longer than everything else: for this many cases.
COMPILED_CASES = 4
COPY_BYTES = 1 << 31
GEMM_SIZE = 8192


def processors() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def device_clock() -> DeviceClock:
    """Events on the current stream; the cold start overwrites a buffer larger than the cache."""
    buffer = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    return DeviceClock(lambda: torch.cuda.Event(enable_timing=True), buffer.zero_)


def ceilings(timed: Timed, device: str = "cuda", scale: int = 1) -> dict[str, float]:
    """GB/s of a device-to-device copy (read + written), TFLOP/s of a bf16 product; random data."""
    size = COPY_BYTES // scale // 2
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    n = GEMM_SIZE // scale
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    works = {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(a, b)}
    timings = measure(works, "copy", rounds=10, timed=timed)
    return {
        "copy_gb_s": 2 * size / timings["copy"].seconds.median / 1e9,
        "gemm_tflops": 2 * n**3 / timings["gemm"].seconds.median / 1e12,
    }


def launches(work: Callable[[], object]) -> int | None:
    """Kernels that one call starts on the device, by torch's profiler; None where it sees none."""
    work()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    count = sum(
        e.device_type == cuda and not e.name.startswith(("Memcpy", "Memset"))
        for e in profile.events()
    )
    return count or None


def peak_bytes(work: Callable[[], object]) -> int:
    """Most device memory that a call takes beyond what is there before it."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _flops(case: Case, name: str, mode: str) -> float:
    """Of the useful arithmetic: the frozen layer has no adapter part."""
    if name == BASELINE:
        one = 2.0 * case.M * case.K * sum(case.outs)
        return one * (2 if mode == "fwdbwd" else 1)
    spec = _registry.find("lora_linear")
    directions = ("fwd", "bwd") if mode == "fwdbwd" else (mode,)
    return sum(spec.flops(case.problem(), d) for d in directions)


def _bytes(case: Case, mode: str) -> float:
    """Every operand read once, every result written once, per direction."""
    spec = _registry.find("lora_linear")
    directions = ("fwd", "bwd") if mode == "fwdbwd" else (mode,)
    return sum(spec.min_bytes(case.problem(), d) for d in directions)


def figures(timing: Timing, flops: float, traffic: float, top: dict[str, float]) -> dict[str, Any]:
    """What a row tells of a time: rates, and their shares of the ceilings of the same run."""
    seconds = timing.seconds.median
    tflops, gb_s = flops / seconds / 1e12, traffic / seconds / 1e9
    return {
        "median_ms": 1e3 * seconds,
        "iqr_ms": [1e3 * timing.seconds.q1, 1e3 * timing.seconds.q3],
        "ratio": timing.ratio.median,
        "ratio_iqr": [timing.ratio.q1, timing.ratio.q3],
        "tflops": tflops,
        "gb_s": gb_s,
        "gemm_share": tflops / top["gemm_tflops"],
        "copy_share": gb_s / top["copy_gb_s"],
        "first_call_ms": 1e3 * timing.first_call,
        "calls_per_round": timing.calls_per_round,
    }


def label(case: Case) -> str:
    """Of a problem in a record; the dtype of the adapter is the provider's."""
    dtype = _evidence.name_of(case.dtype)
    sizes = f"{case.M}×{case.K}×{'+'.join(str(n) for n in case.outs)}"
    return f"{sizes} r{case.rank}{f' p{case.dropout_p:g}' if case.dropout_p else ''} {dtype}"


def row(
    case: Case, mode: str, name: str, timing: Timing | None, skipped: str | None,
    top: dict[str, float], used: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    key = _evidence.key_of(case.problem(torch.float32 if name.endswith("-fp32") else None))
    made: dict[str, Any] = {
        "op": "lora_linear",
        "case": label(case),
        "sizes": dict(key.sizes),
        "kind": dict(key.kind),
        "shape": [case.M, case.K, sum(case.outs)],
        "members": list(case.outs),
        "rank": case.rank,
        "dropout": case.dropout_p,
        "dtype": _evidence.name_of(case.dtype),
        "mode": mode,
        "provider": name,
        "skipped": skipped,
    }
    if timing is None:
        return made
    return made | figures(timing, _flops(case, name, mode), _bytes(case, mode), top) | used


class DeviceLostError(RuntimeError):
    """A provider left the device unusable: nothing after it can be judged."""


def still_there(name: str) -> None:
    """Raises DeviceLostError when the device no longer answers after `name` ran."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(f"{name}: {str(error).splitlines()[0]}") from error


def failure(error: Exception) -> str:
    return f"FAILED: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def usable(
    names: list[str], case: Case, announce: Announce = lambda name, case: None
) -> tuple[dict[str, Provider], dict[str, str]]:
    """(providers that passed the gate, reasons of the others)."""
    gate, passed, reasons = Gate(), {}, {}
    for name in names:
        announce(name, case)
        try:
            provider = providers.build(name, case)
            gate.check(provider, case)
            passed[name] = provider
        except UnavailableError as error:
            reasons[name] = str(error)
        except BudgetExceededError as error:
            reasons[name] = f"WRONG: {error}"
        except Exception as error:  # also what another project's code may raise
            reasons[name] = failure(error)
            still_there(name)
    announce("", case)
    return passed, reasons


def run_case(
    case: Case, names: list[str], modes: tuple[str, ...], top: dict[str, float], timed: Timed,
    rounds: int, count: tuple[str, ...] = MODES, announce: Announce = lambda name, case: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per mode and provider; `count`: modes with launches and memory (needs a GPU).
    `announce` is told which provider is about to run for the first time, and "" when all have."""
    passed, reasons = usable(names, case, announce)
    rows = []
    for mode in modes:
        works, used, failed = {}, {}, dict(reasons)
        for name, provider in passed.items():
            work = getattr(provider, mode)
            try:
                work()
                counted = mode in count
                used[name] = {
                    "launches": launches(work) if counted else None,
                    "peak_bytes": peak_bytes(work) if counted else None,
                }
                works[name] = work
            except Exception as error:  # also what another project's code may raise
                failed[name] = failure(error)
                still_there(name)
        timings = measure(works, BASELINE, rounds=rounds, round_seconds=0.008, timed=timed)
        rows += [
            row(case, mode, n, timings.get(n), failed.get(n), top, used.get(n, {})) for n in names
        ]
    return rows


def run_all(
    cases: tuple[Case, ...], names: list[str], modes: tuple[str, ...], top: dict[str, float],
    timed: Timed, rounds: int, deadline: float, count: tuple[str, ...] = MODES,
    announce: Announce = lambda name, case: None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows of all cases. A case that does not start before `deadline` (time.monotonic) has rows
    that say so. `count`: modes with launches and memory in the first case; in the others it is the
    last of these modes alone, since the profiler takes its time."""
    for number, case in enumerate(cases):
        here = [n for n in names if n != "peft-compile" or number < COMPILED_CASES]
        if time.monotonic() >= deadline:
            for mode in modes:
                for name in here:
                    yield row(case, mode, name, None, "no time left", top, {})
            continue
        yield from run_case(case, here, modes, top, timed, rounds, count, announce)
        count = count[-1:]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
