"""Time lora_linear against the frozen layer and PEFT.

    python -m benchmarks.run --op lora_linear --device cpu [--shapes "M,K,N;..."]
        [--dtype bf16,fp32] [--rank 16] [--modes fwd,fwdbwd] [--providers ...]
        [--json OUT] [--png OUT]
    python -m benchmarks.run --op lora_linear --device cuda ...

The second form is the benchmark of gpu-check on shapes of one's own; without a GPU its exit code
is 3. Every provider is checked against an fp64 oracle before it is timed; the exit code is 1 when
one of them fails, and that one gets no time.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu, gpu_report, machine, memory, providers, record, report
from benchmarks.gate import Gate
from benchmarks.providers import BASELINE, Case, Provider, UnavailableError
from benchmarks.timing import Timing, measure
from lora_kernels.errors import LoraKernelsError
from lora_kernels.ops import _registry
from lora_kernels.testing import BudgetExceededError

SHAPES = "512,2048,2048;2048,2048,2048;2048,2048,5632;1024,5632,2048;1024,576,1536;1024,1536,576"
GPU = "8192,4096,4096;8192,4096,14336;8192,14336,4096;8192,8192,8192"
NO_GPU = 3
DTYPES = {
    "bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64,
}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", default="lora_linear", choices=["lora_linear"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", help=f"M,K,N;M,K,N;... default: {SHAPES} or, on a GPU, {GPU}")
    parser.add_argument("--dtype", help=f"of {', '.join(DTYPES)}; default: bf16,fp32 or bf16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--modes", help="fwd, fwdbwd; on a GPU bwd too")
    parser.add_argument("--providers")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--threads", type=int, help="intra-op threads; torch's default when left out"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip the memory processes")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<device>/...")
    parser.add_argument("--png", type=Path, help="chart; none when left out")
    options = parser.parse_args(argv)
    on_gpu = options.device == "cuda"
    options.shapes = options.shapes or (GPU if on_gpu else SHAPES)
    options.dtype = options.dtype or ("bf16" if on_gpu else "bf16,fp32")
    modes = gpu_report.MODES if on_gpu else report.MODES
    options.modes = options.modes or ",".join(modes)
    options.providers = options.providers or ",".join(gpu.DEFAULT if on_gpu else providers.DEFAULT)
    for name in ("png", "threads"):
        if on_gpu and getattr(options, name):
            parser.error(f"argument --{name}: accepted: with --device cpu only")
    try:
        options.shapes = [
            tuple(int(n) for n in shape.split(",")) for shape in options.shapes.split(";") if shape
        ]
        if any(len(s) != 3 or min(s) < 1 for s in options.shapes):
            raise ValueError
    except ValueError:
        parser.error("argument --shapes: accepted: M,K,N;M,K,N;... of positive integers")
    for name, known in (
        ("dtype", DTYPES), ("modes", modes), ("providers", providers.LABELS),
    ):  # fmt: skip
        given = [v.strip() for v in getattr(options, name).split(",") if v.strip()]
        if not given or set(given) - set(known):
            parser.error(f"argument --{name}: accepted: {', '.join(known)}, separated by commas")
        setattr(options, name, list(dict.fromkeys(given)))
    if options.rank < 1 or options.rounds < 1 or not 0.0 <= options.dropout <= 1.0:
        parser.error("--rank and --rounds must be at least 1, --dropout in 0 to 1")
    options.providers = [BASELINE, *(p for p in options.providers if p != BASELINE)]
    return options


def usable(names: list[str], case: Case) -> tuple[dict[str, Provider], dict[str, str], bool]:
    """(providers that passed the gate, reasons of the others, did one fail the gate)."""
    gate, passed, reasons, red = Gate(), {}, {}, False
    for name in names:
        try:
            provider = providers.build(name, case)
            gate.check(provider, case)
            passed[name] = provider
        except UnavailableError as error:
            reasons[name] = str(error)
        except BudgetExceededError as error:
            reasons[name], red = f"WRONG: {error}", True
        except (LoraKernelsError, RuntimeError) as error:
            reasons[name], red = f"FAILED: {str(error).splitlines()[0]}", True
    return passed, reasons, red


def flops(case: Case, name: str, mode: str) -> float:
    """Of the useful arithmetic: the frozen layer has no adapter part."""
    if name == BASELINE:
        return 2.0 * case.M * case.K * case.N * (1 if mode == "fwd" else 2)
    spec = _registry.find("lora_linear")
    directions = ("fwd",) if mode == "fwd" else ("fwd", "bwd")
    return sum(spec.flops(case.problem(), d) for d in directions)


def row(
    case: Case, mode: str, name: str, timing: Timing | None, skipped: str | None,
    used: dict[str, int | None], peak: float | None,
) -> dict[str, Any]:  # fmt: skip
    made: dict[str, Any] = {
        "shape": [case.M, case.K, case.N],
        "dtype": str(case.dtype).removeprefix("torch."),
        "mode": mode,
        "provider": name,
        "skipped": skipped,
    }
    if timing is None:
        return made
    gflops = flops(case, name, mode) / timing.seconds.median / 1e9
    return made | {
        "median_ms": 1e3 * timing.seconds.median,
        "iqr_ms": [1e3 * timing.seconds.q1, 1e3 * timing.seconds.q3],
        "ratio": timing.ratio.median,
        "ratio_iqr": [timing.ratio.q1, timing.ratio.q3],
        "gflops": gflops,
        "peak_gflops": peak,
        "peak_share": gflops / peak if peak else None,
        "first_call_ms": 1e3 * timing.first_call,
        "calls_per_round": timing.calls_per_round,
        **used,
    }


def sample_peak(into: list[float]) -> None:
    """A tile loop of 10 ms."""
    gflops, _ = machine.amx_peak(0.01)
    if gflops is not None:
        into.append(gflops)


def on_a_gpu(argv: list[str], options: argparse.Namespace) -> int:
    try:
        device = machine.gpu()
    except UnavailableError as error:
        print(f"benchmarks.run: {error}; nothing was measured", file=sys.stderr)
        return NO_GPU
    timed = gpu.device_clock()
    result: dict[str, Any] = {
        "schema": record.SCHEMA, "op": options.op,
        **machine.describe("benchmarks.run", argv, device),
        "triton": machine.version("triton"), "rounds": options.rounds,
        "ceilings": gpu.ceilings(timed), "rows": [],
    }  # fmt: skip
    print(gpu_report.table(result), gpu_report.HEADER, sep="\n", flush=True)
    base = Case(0, 0, 0, options.rank, torch.float32, options.dropout, device="cuda")
    cases = tuple(
        replace(base, M=m, K=k, N=n, dtype=DTYPES[dtype])
        for dtype in options.dtype
        for m, k, n in options.shapes
    )
    for made in gpu.run_all(
        cases, options.providers, tuple(options.modes), result["ceilings"], timed,
        options.rounds, math.inf, count=() if options.no_memory else gpu.MODES,
    ):  # fmt: skip
        result["rows"].append(made)
        print(gpu_report.line(made), flush=True)
    record.keep(result, options.json)
    wrong = ("WRONG", "FAILED")
    return 1 if any((r["skipped"] or "").startswith(wrong) for r in result["rows"]) else 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.device == "cuda":
        return on_a_gpu(argv, options)
    if options.threads:
        torch.set_num_threads(options.threads)
    peak, peak_reason = machine.amx_peak()
    result: dict[str, Any] = {
        "schema": record.SCHEMA, "op": options.op, **machine.describe("benchmarks.run", argv),
        "rank": options.rank,
        "dropout": options.dropout, "rounds": options.rounds,
        "amx_peak": {"gflops": peak, "reason": peak_reason}, "rows": [],
    }  # fmt: skip
    print(report.subtitle(result))
    shown = "n/a" if peak is None else f"{peak:.0f} GFLOP/s"
    print(f"AMX bf16 peak: {shown} ({peak_reason}; shares: the peak between the rounds)")
    print(report.HEADER)
    any_red = False
    base = Case(0, 0, 0, options.rank, torch.float32, options.dropout)
    for dtype in options.dtype:
        for m, k, n in options.shapes:
            case = replace(base, M=m, K=k, N=n, dtype=DTYPES[dtype])
            passed, reasons, red = usable(options.providers, case)
            any_red |= red
            none: dict[str, int | None] = {"peak_bytes": None, "saved_bytes": None}
            used = {p: none if options.no_memory else memory.in_child(p, case) for p in passed}
            for mode in options.modes:
                works = {p: getattr(provider, mode) for p, provider in passed.items()}
                peaks: list[float] = []
                # The tile unit clocks lower once it is warm: its peak is taken between the rounds.
                with_peak = peak is not None and case.dtype == torch.bfloat16
                timings = measure(
                    works, BASELINE, rounds=options.rounds,
                    after_round=(lambda into=peaks: sample_peak(into)) if with_peak else None,
                ) if works else {}  # fmt: skip
                for name in options.providers:
                    made = row(
                        case, mode, name, timings.get(name), reasons.get(name),
                        used.get(name, none), statistics.median(peaks) if peaks else None,
                    )  # fmt: skip
                    result["rows"].append(made)
                    print(report.line(made), flush=True)
    record.keep(result, options.json)
    if options.png:
        report.chart(result, options.png)
        print(f"chart: {options.png}")
    return 1 if any_red else 0


if __name__ == "__main__":
    sys.exit(main())
