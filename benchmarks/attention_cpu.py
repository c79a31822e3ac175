"""Time attention on the CPU: PyTorch's SDPA as transformers calls it, `aten`, and the C++ kernels.

    python -m benchmarks.attention_cpu [--dtype bf16,fp32] [--rounds 9] [--json OUT] [--page PAGE]

All providers of a row in turns, forward and forward + backward. Before any time is taken, the op is
held to the fp64 formula with the features of the row. --page docs/attention.md fills the region
between its markers from the newest record and times nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, record
from benchmarks.options import DTYPES
from benchmarks.readme_table import fill_page
from benchmarks.report import commit_line, machine_line
from benchmarks.timing import measure
from lora_kernels.ops import attention
from lora_kernels.testing import attention_inputs, check_attention

BEGIN, END = "<!-- attention-benchmark:begin -->", "<!-- attention-benchmark:end -->"
MODES = {"fwd": "forward", "fwd_bwd": "forward + backward"}
# name: (B, S, H, Hk, D), features
ROWS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "4 x 256, 9 heads of 64 on 3, causal": ((4, 256, 9, 3, 64), {"causal": True}),
    "2048, 8 heads of 128 on 4, causal": ((1, 2048, 8, 4, 128), {"causal": True}),
    "4096, 4 heads of 64, window of 128": (
        (1, 4096, 4, 4, 64),
        {"causal": True, "window": (127, 0)},
    ),
    "1024 in 5 packed sequences, 9 heads of 64 on 3": (
        (1, 1024, 9, 3, 64),
        {"causal": True, "lengths": (100, 411, 37, 256, 220)},
    ),
    "1024, 8 heads of 64 on 2, causal, sinks": (
        (1, 1024, 8, 2, 64),
        {"causal": True, "sinks": True},
    ),
    "512, 8 heads of 128 on 4, causal, softcap": (
        (1, 512, 8, 4, 128),
        {"causal": True, "softcap": 30.0},
    ),
}


def sdpa(i: Any) -> Tensor:
    """As transformers calls it: whatever is not plain causal becomes a mask of [S, S]."""
    q, k, v = ((t if i.cu_seqlens is None else t.unsqueeze(0)).transpose(1, 2) for t in
               (i.q, i.k, i.v))  # fmt: skip
    mask = None
    if "window" in i.options or i.cu_seqlens is not None:
        at = torch.arange(q.shape[2])
        distance = at[:, None] - at
        mask = (distance >= 0) & (distance <= i.options.get("window", (len(at), 0))[0])
        if i.cu_seqlens is not None:
            owner = torch.bucketize(at, i.cu_seqlens[1:], right=True)
            mask &= owner[:, None] == owner
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


def time_row(name: str, dtype: str, rounds: int) -> list[dict[str, Any]]:
    (b, s, h, hk, d), features = ROWS[name]
    backends = ("aten", "cpu")
    for backend in backends:
        check_attention(attention_inputs(1, 70, dtype=DTYPES[dtype], Hk=2, **features), backend)
    i = attention_inputs(b, s, h, d, Hk=hk, dtype=DTYPES[dtype], **features)
    leaves = {n: t.requires_grad_() for n, t in i.leaves().items()}

    def op(backend: str) -> Callable[[], Any]:
        return lambda: attention(**leaves, **i.constants(), **i.options, backend=backend)

    forwards = {backend: op(backend) for backend in backends}
    if not features.keys() & {"sinks", "softcap"}:
        forwards = {"sdpa": lambda: sdpa(i), **forwards}
    made = []
    for mode in MODES:
        works = {}
        for provider, forward in forwards.items():

            def both(forward: Callable[[], Any] = forward) -> None:
                out = forward()
                torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))

            def alone(forward: Callable[[], Any] = forward) -> None:
                with torch.no_grad():
                    forward()

            works[provider] = alone if mode == "fwd" else both
        for provider, timing in measure(works, "aten", rounds=rounds).items():
            made.append({
                "row": name, "dtype": dtype, "mode": mode, "provider": provider,
                "median_ms": 1e3 * timing.seconds.median,
                "iqr_ms": [1e3 * timing.seconds.q1, 1e3 * timing.seconds.q3],
                "ratio": timing.ratio.median, "ratio_iqr": [timing.ratio.q1, timing.ratio.q3],
            })  # fmt: skip
    return made


def render(result: dict[str, Any]) -> str:
    lines = [
        f"{machine_line(result)}; milliseconds, median of {result['rounds']} interleaved rounds. "
        "SDPA is given a mask of queries x keys for windows and packed sequences.",
    ]  # fmt: skip
    for dtype, mode in dict.fromkeys((r["dtype"], r["mode"]) for r in result["rows"]):
        lines += ["", f"| {dtype}, {MODES[mode]} | SDPA | `aten` | `cpu` | `aten` / `cpu` |",
                  "|---|---:|---:|---:|---:|"]  # fmt: skip
        here = [r for r in result["rows"] if (r["dtype"], r["mode"]) == (dtype, mode)]
        for name in dict.fromkeys(r["row"] for r in here):
            by = {r["provider"]: r for r in here if r["row"] == name}
            cells = [f"{by[p]['median_ms']:.2f}" if p in by else "-" for p in
                     ("sdpa", "aten", "cpu")]  # fmt: skip
            low, high = sorted(1 / v for v in by["cpu"]["ratio_iqr"])
            share = f"{1 / by['cpu']['ratio']:.2f} ({low:.2f}-{high:.2f})"
            lines.append(f"| {name} | {' | '.join(cells)} | {share} |")
    lines += ["", commit_line(result)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_cpu")
    parser.add_argument("--dtype", default="bf16,fp32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<device>/...")
    parser.add_argument("--page", type=Path, help="fill this page from the newest record")
    options = parser.parse_args(arguments)
    if options.page is not None:
        fill_page(options.page, record.newest("attention"), render, BEGIN, END)
        return 0
    result: dict[str, Any] = {
        "schema": record.SCHEMA, "op": "attention",
        **machine.describe("benchmarks.attention_cpu", arguments),
        "rounds": options.rounds, "rows": [],
    }  # fmt: skip
    torch.manual_seed(0)
    for dtype in options.dtype.split(","):
        for name in ROWS:
            made = time_row(name, dtype, options.rounds)
            result["rows"] += made
            for r in made:
                print(
                    f"{dtype} {r['mode']:<8}{name:<50}{r['provider']:<6}{r['median_ms']:9.2f} ms "
                    f"x{r['ratio']:.2f} [{r['ratio_iqr'][0]:.2f}, {r['ratio_iqr'][1]:.2f}]",
                    flush=True,
                )
    record.keep(result, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
