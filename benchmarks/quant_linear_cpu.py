"""Time the CPU kernels of quantized weights against the bf16 path, bitsandbytes and torchao.

    python -m benchmarks.quant_linear_cpu [--shapes "4096,4096;14336,4096"] [--rows 512,2048]
        [--rounds 15] [--json OUT] [--no-peers]

Four tables in one process, all providers of a table in turns. Shares of bandwidth are of a copy
(bytes read plus bytes written) that takes its turn among them.

    gemv        Y = X W^T with one row, on the first shape with 2 to 16, too, bf16; bytes are those
                of the packed weight and statistics
    dequantize  W in bf16, into a tensor that is there already, or into a new one, whose pages the
                system has to clear first
    fwd         Y with a LoRA adapter of rank 16, training-size M
    fwd+bwd     the same with dX, dA, dB

Weights take turns too, three copies of each, so that no call finds its weight in L2. Before any
time is taken, our results are held to the fp64 product of the dequantized weight within the error
budget, and those of the peers to twice our error against the unquantized weight.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, record
from benchmarks.timing import Timing, measure
from lora_kernels.ops.lora_linear import cpu as lora_linear_cpu
from lora_kernels.ops.quant_linear import cpu, reference
from lora_kernels.ops.quant_linear.formats import QuantSpec
from lora_kernels.testing import assert_within_budget

COPIES, RANK, COPY_BYTES = 3, 16, 2**26
DTYPE = torch.bfloat16
# name: format, layout, block, nested block
FORMATS = {
    "nf4": ("nf4", "flat", 64, 0),
    "nf4+dq": ("nf4", "flat", 64, 256),
    "int8": ("int8", "int8_row", 64, 0),
    "int4 g128": ("int4", "gptq", 128, 0),
    "fp8": ("fp8", "fp8_row", 64, 0),
}
# Beside these, for one row: what else checkpoints hold.
MORE_FORMATS = {
    "fp4": ("fp4", "flat", 64, 0),
    "int4 g32": ("int4", "gptq", 32, 0),
    "int4 g64": ("int4", "gptq", 64, 0),
    "int4 g128 act-order": ("int4", "gptq", 128, 0),
    "int4 rows": ("int4", "gptq", -1, 0),
    "fp8 128x128": ("fp8", "fp8_block", 128, 0),
}
FEW_ROWS = (2, 4, 8, 16)
Parts = tuple[Tensor, ...]
Work = Callable[[], object]


def packed(w: Tensor, name: str) -> tuple[QuantSpec, list[Parts]]:
    fmt, layout, block, nested = (FORMATS | MORE_FORMATS)[name]
    block = w.shape[1] if block == -1 else block
    spec = QuantSpec(fmt, layout, tuple(w.shape), DTYPE, block, nested)
    if cpu.quantize(w[:1], replace(spec, shape=(1, w.shape[1]))) is not None:
        return spec, [cpu.quantize(w, spec) or () for _ in range(COPIES)]
    parts = reference.quantize(w, spec)
    if "act-order" in name:
        spec = replace(spec, act_order=True)
        parts = (*parts[:3], parts[3][torch.randperm(w.shape[1])].contiguous())
    return spec, [tuple(p.clone() for p in parts) for _ in range(COPIES)]


def size(parts: Parts) -> int:
    return sum(p.nbytes for p in parts)


def in_turns(call: Callable[[Any], object], copies: list[Any]) -> Work:
    turn = itertools.cycle(copies)
    return lambda: call(next(turn))


def copy_work() -> Work:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item()


def peers(w: Tensor, x: Tensor) -> dict[str, tuple[Work, int, str]]:
    """Name to (work, bytes of the weight, our format to compare the error with)."""
    found: dict[str, tuple[Work, int, str]] = {}
    n, k = w.shape
    try:
        import bitsandbytes as bnb

        code, state = bnb.functional.quantize_4bit(w.to(DTYPE), blocksize=64, quant_type="nf4")
        codes = [code.clone().t() for _ in range(COPIES)]
        found["bitsandbytes nf4"] = (
            in_turns(lambda c: bnb.matmul_4bit(x, c, quant_state=state), codes),
            size((code, state.absmax)), "nf4",
        )  # fmt: skip
        rows = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
        rows.load_state_dict({"weight": w.to(DTYPE)})
        rows = rows.to("cpu")
        found["bitsandbytes int8"] = (lambda: rows(x), n * k + 4 * n, "int8")
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"bitsandbytes: {str(error).splitlines()[0]}", file=sys.stderr)
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        for name, config, like, weight_bytes in (
            ("torchao int8", Int8WeightOnlyConfig(), "int8", n * k + 2 * n),
            ("torchao int4 g128", PrototypeInt4WeightOnlyConfig(group_size=128), "int4 g128",
             n * k // 2 + n * k // 128 * 4),
        ):  # fmt: skip
            layer = torch.nn.Linear(k, n, bias=False, dtype=DTYPE)
            layer.weight.data = w.to(DTYPE)
            quantize_(layer, config)
            copies = [layer, *(copy.deepcopy(layer) for _ in range(COPIES - 1))]
            found[name] = (in_turns(lambda c: c(x), copies), weight_bytes, like)
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"torchao: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def row(table: str, shape: list[int], name: str, timing: Timing, **more: Any) -> dict[str, Any]:
    return {
        "table": table,
        "shape": shape,
        "provider": name,
        "median_us": 1e6 * timing.seconds.median,
        "iqr_us": [1e6 * timing.seconds.q1, 1e6 * timing.seconds.q3],
        "ratio": timing.ratio.median,
        "ratio_iqr": [timing.ratio.q1, timing.ratio.q3],
        **more,
    }


def bandwidth_rows(
    table: str, shape: list[int], works: dict[str, Work], moved: dict[str, int],
    baseline: str, rounds: int,
) -> list[dict[str, Any]]:  # fmt: skip
    works = works | {"copy": copy_work()}
    timings = measure(works, baseline, rounds=rounds, round_seconds=0.01)
    copy_rate = 2 * COPY_BYTES / timings["copy"].seconds.median
    made = []
    for name, timing in timings.items():
        rate = (2 * COPY_BYTES if name == "copy" else moved[name]) / timing.seconds.median
        made.append(
            row(table, shape, name, timing, gbytes_per_s=rate / 1e9, of_copy=rate / copy_rate)
        )
    return made


def gemv(w: Tensor, rounds: int, with_peers: bool, m: int = 1) -> list[dict[str, Any]]:
    n, k = w.shape
    x = torch.randn(m, k).to(DTYPE)
    exact = x.double() @ w.double().t()
    plain = [w.to(DTYPE) for _ in range(COPIES)]
    works: dict[str, Work] = {"torch bf16": in_turns(lambda c: F.linear(x, c), plain)}
    moved, errors = {"torch bf16": plain[0].nbytes}, {}
    for name in FORMATS | (MORE_FORMATS if m == 1 else {}):
        spec, copies = packed(w, name)

        def call(parts: Parts, spec: QuantSpec = spec) -> Tensor:
            return cpu.quant_linear_fwd(x, parts, spec, None, None, None, 0.0, 0.0, None)[0]

        y = call(copies[0])
        back = reference.dequantize(copies[0], spec, DTYPE)
        assert_within_budget(y, x.double() @ back.double().t(), F.linear(x, back), name)
        errors[name] = _rms(y - exact)
        works[f"lora_kernels {name}"] = in_turns(call, copies)
        moved[f"lora_kernels {name}"] = size(copies[0])
    for name, (work, weight_bytes, like) in (peers(w, x) if with_peers else {}).items():
        error = _rms(work() - exact)
        if not error <= 2.0 * errors[like]:
            print(f"{name}: WRONG, rms error {error:.3g}, ours {errors[like]:.3g}")
            continue
        works[name], moved[name] = work, weight_bytes
    return bandwidth_rows("gemv", [m, k, n], works, moved, "torch bf16", rounds)


def dequantize(w: Tensor, rounds: int, with_peers: bool) -> list[dict[str, Any]]:
    out = torch.empty(w.shape, dtype=DTYPE)
    works: dict[str, Work] = {}
    moved = {}
    for name in ("nf4", "nf4+dq", "int8"):
        spec, copies = packed(w, name)
        cpu.dequantize(copies[0], spec, DTYPE, out)
        if not torch.equal(out, reference.dequantize(copies[0], spec, DTYPE)):
            raise AssertionError(f"dequantize of {name} differs from the reference")
        works[f"lora_kernels {name}"] = in_turns(
            lambda parts, spec=spec: cpu.dequantize(parts, spec, DTYPE, out), copies
        )
        moved[f"lora_kernels {name}"] = size(copies[0]) + out.nbytes
        if name == "nf4":
            works["lora_kernels nf4, new tensor"] = in_turns(
                lambda parts, spec=spec: cpu.dequantize(parts, spec, DTYPE), copies
            )
            moved["lora_kernels nf4, new tensor"] = moved["lora_kernels nf4"]
    if with_peers:
        try:
            import bitsandbytes.functional as bnb

            code, state = bnb.quantize_4bit(w.to(DTYPE), blocksize=64, quant_type="nf4")
            works["bitsandbytes nf4, new tensor"] = lambda: bnb.dequantize_4bit(code, state)
            moved["bitsandbytes nf4, new tensor"] = size((code, state.absmax)) + out.nbytes
        except ImportError as error:
            print(f"bitsandbytes: {error}", file=sys.stderr)
    return bandwidth_rows("dequantize", list(w.shape), works, moved, "lora_kernels nf4", rounds)


def training(w: Tensor, m: int, rounds: int) -> list[dict[str, Any]]:
    n, k = w.shape
    base = w.to(DTYPE)
    x, dy = torch.randn(m, k).to(DTYPE), torch.randn(m, n).to(DTYPE)
    a, b = torch.randn(RANK, k).to(DTYPE), (torch.randn(n, RANK) / 64).to(DTYPE)
    forward: dict[str, Work] = {
        "torch bf16, frozen": lambda: F.linear(x, base),
        "lora_kernels bf16": lambda: lora_linear_cpu.lora_linear_fwd(
            x, [base], [a], [b], [None], [1.0], 0.0, None
        ),
    }
    s = (x @ a.t()).to(DTYPE)
    backward: dict[str, Work] = {
        "torch bf16, frozen": lambda: dy @ base,
        "lora_kernels bf16": lambda: lora_linear_cpu.lora_linear_bwd(
            [dy], x, [base], [a], [b], s, [1.0], 0.0, None, True, True, True
        ),
    }
    for name in FORMATS:
        spec, (parts, *_) = packed(w, name)
        y, _ = cpu.quant_linear_fwd(x, parts, spec, None, a, b, 1.0, 0.0, None)
        back = reference.dequantize(parts, spec, DTYPE)
        some = slice(0, m, 37)
        exact = x[some].double() @ (back.double() + b.double() @ a.double()).t()
        low = F.linear(x[some], back) + F.linear(F.linear(x[some], a), b)
        assert_within_budget(y[some], exact, low, name)

        def run(parts: Parts = parts, spec: QuantSpec = spec) -> object:
            return cpu.quant_linear_fwd(x, parts, spec, None, a, b, 1.0, 0.0, None)

        def run_back(parts: Parts = parts, spec: QuantSpec = spec) -> object:
            return cpu.quant_linear_bwd(
                dy, x, parts, spec, a, b, s, 1.0, 0.0, None, True, True, True
            )

        forward[f"lora_kernels {name}"] = run
        backward[f"lora_kernels {name}"] = run_back
    made = []
    both = {
        name: (lambda f=forward[name], g=backward[name]: (f(), g())) for name in forward
    }  # fmt: skip
    # Backwards first: the first of a weight asks for large pages, and training has seen it.
    for table, works in (("fwd+bwd", both), ("fwd", forward)):
        timings = measure(works, "lora_kernels bf16", rounds=rounds, round_seconds=0.02)
        work = 2.0 * m * n * k * (1 if table == "fwd" else 2)
        made += [
            row(table, [m, k, n], name, t, gflops=work / t.seconds.median / 1e9)
            for name, t in timings.items()
        ]
    return made


def line(r: dict[str, Any]) -> str:
    shape = "x".join(str(v) for v in r["shape"])
    rate = (
        f"{r['gbytes_per_s']:6.1f} GB/s {100 * r['of_copy']:4.0f} % of copy"
        if "of_copy" in r
        else f"{r['gflops']:6.0f} GFLOP/s"
    )
    low, high = r["iqr_us"]
    return (
        f"{r['table']:<10} {shape:<15} {r['provider']:<28} {r['median_us']:9.0f} us "
        f"[{low:.0f}, {high:.0f}]  x{r['ratio']:.2f}  {rate}"
    )


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quant_linear_cpu")
    parser.add_argument("--shapes", default="4096,4096;14336,4096", help="N,K;N,K;...")
    parser.add_argument("--rows", default="512,2048", help="M,M,... of the training tables")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<device>/...")
    options = parser.parse_args(arguments)
    shapes = [tuple(int(v) for v in s.split(",")) for s in options.shapes.split(";") if s]
    rows = [int(m) for m in options.rows.split(",") if m]
    result: dict[str, Any] = {
        "schema": record.SCHEMA,
        "op": "quant_linear",
        **machine.describe("benchmarks.quant_linear_cpu", arguments),
        "bitsandbytes": machine.version("bitsandbytes"),
        "torchao": machine.version("torchao"),
        "rounds": options.rounds,
        "rank": RANK,
        "rows": [],
    }
    torch.manual_seed(0)
    with torch.no_grad():
        for n, k in shapes:
            w = torch.randn(n, k) / k**0.5
            made = gemv(w, options.rounds, not options.no_peers)
            for m in FEW_ROWS if (n, k) == shapes[0] else ():
                made += gemv(w, max(3, options.rounds // 2), False, m)
            made += dequantize(w, options.rounds, not options.no_peers)
            if (n, k) == shapes[0]:
                for m in rows:
                    made += training(w, m, max(3, options.rounds // 2))
            result["rows"] += made
            print("\n".join(map(line, made)), flush=True)
    record.keep(result, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
