"""Time a generation step's attention on the CPU: one query per sequence over a cache.

    python -m benchmarks.attention_decode_cpu [--dtype bf16,fp32] [--rounds 15] [--json OUT]
        [--page PAGE]

SDPA over a cache that it likes ([B, Hk, C, D]), and ``attention_decode`` over both orders and over
pages of 16, in turns; beside them a copy of as many bytes as keys and values have. Before any time
is taken the op is held to the fp64 formula. --page docs/attention.md fills the region between its
markers from the newest record and times nothing.
"""

from __future__ import annotations

import argparse
import sys
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
from lora_kernels.ops import attention_decode
from lora_kernels.testing import assert_within_budget

BEGIN, END = "<!-- decode-benchmark:begin -->", "<!-- decode-benchmark:end -->"
PAGE = 16
# B, H, Hk, D, keys
ROWS = (
    (1, 9, 3, 64, 300), (1, 9, 3, 64, 2048), (1, 32, 8, 128, 4096), (8, 32, 8, 64, 1024),
    (4, 8, 8, 64, 512),
)  # fmt: skip
PROVIDERS = {
    "copy": "copy", "sdpa": "SDPA", "heads": "heads first", "keys": "keys first",
    "pages": "pages of 16",
}  # fmt: skip


def paged(t: Tensor) -> tuple[Tensor, Tensor]:
    """(pages of [B, C, Hk, D] in a drawn order, block_table [B, pages])."""
    batch, keys = t.shape[:2]
    table = torch.randperm(batch * keys // PAGE).view(batch, -1)
    pool = t.new_empty(table.numel(), PAGE, *t.shape[2:])
    pool[table.flatten()] = t.reshape(-1, PAGE, *t.shape[2:])
    return pool, table.int()


def time_row(row: tuple[int, ...], dtype: str, rounds: int) -> dict[str, Any]:
    b, h, hk, d, n = row
    n = n // PAGE * PAGE
    q, k, v = (torch.randn(b, s, g, d).to(DTYPES[dtype]) for s, g in ((1, h), (n, hk), (n, hk)))
    lengths = torch.full((b,), n, dtype=torch.int32)
    heads = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    turned = [t.transpose(1, 2) for t in heads]
    torch.manual_seed(1)
    k_pages, table = paged(k)
    torch.manual_seed(1)
    v_pages, _ = paged(v)
    source = torch.empty(2 * k.numel() * k.element_size() // 4)
    target = torch.empty_like(source)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(*heads, enable_gqa=True)

    works = {
        "sdpa": sdpa,
        "copy": lambda: target.copy_(source),
        "heads": lambda: attention_decode(*turned, lengths, backend="cpu"),
        "keys": lambda: attention_decode(q, k, v, lengths, backend="cpu"),
        "pages": lambda: attention_decode(
            q, k_pages, v_pages, lengths, block_table=table, backend="cpu"
        ),
    }  # fmt: skip
    with torch.no_grad():
        exact = F.scaled_dot_product_attention(*(t.double() for t in heads), enable_gqa=True)
        for name in ("heads", "keys", "pages"):
            assert_within_budget(works[name]().transpose(1, 2), exact, sdpa(), name)
        timings = measure(works, "sdpa", rounds=rounds)
    return {
        "row": list(row), "dtype": dtype,
        "providers": {
            name: {
                "us": 1e6 * t.seconds.median,
                "iqr_us": [1e6 * t.seconds.q1, 1e6 * t.seconds.q3],
                "ratio": t.ratio.median, "ratio_iqr": [t.ratio.q1, t.ratio.q3],
            }
            for name, t in timings.items()
        },
    }  # fmt: skip


def render(result: dict[str, Any]) -> str:
    lines = [
        f"{machine_line(result)}; microseconds of one step, median of {result['rounds']} "
        "interleaved rounds; copy: as many bytes as the cache has.",
        "",
        "| cache | " + " | ".join(PROVIDERS.values()) + " | SDPA / heads first |",
        "|---|" + "---:|" * (len(PROVIDERS) + 1),
    ]
    for r in result["rows"]:
        b, h, hk, d, n = r["row"]
        cells = [f"{r['providers'][p]['us']:.0f}" for p in PROVIDERS]
        low, high = sorted(1 / x for x in r["providers"]["heads"]["ratio_iqr"])
        share = f"{1 / r['providers']['heads']['ratio']:.2f} ({low:.2f}-{high:.2f})"
        lines.append(
            f"| {r['dtype']}, {b} x {n} keys, {h} heads of {d} on {hk} | {' | '.join(cells)} "
            f"| {share} |"
        )
    lines += ["", commit_line(result)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_decode_cpu")
    parser.add_argument("--dtype", default="bf16,fp32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<device>/...")
    parser.add_argument("--page", type=Path, help="fill this page from the newest record")
    options = parser.parse_args(arguments)
    if options.page is not None:
        fill_page(options.page, record.newest("attention_decode"), render, BEGIN, END)
        return 0
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "schema": record.SCHEMA, "op": "attention_decode",
        **machine.describe("benchmarks.attention_decode_cpu", arguments),
        "rounds": options.rounds,
        "rows": [
            time_row(row, dtype, options.rounds)
            for dtype in options.dtype.split(",") for row in ROWS
        ],
    }  # fmt: skip
    print(render(result))
    record.keep(result, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
