"""What computing the layers of one input together gains: on, and off, in turns.

    python -m benchmarks.grouping [--dtype bf16] [--rank 16] [--rounds 12] [--json OUT]

q, k and v, and gate and up of SmolLM2-135M as PEFT layers under ``lk.apply``. Off is
``LORA_KERNELS_DISABLE=grouped_lora_linear``, each layer fused by itself. Training steps (forward
and backward) of 1024 and 256 rows, forwards without gradients of 1 to 8 rows (decode). Before any
time is taken, both sides are held to an fp64 oracle.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_kernels as lk
from benchmarks import machine, record
from benchmarks.blocks import HIDDEN, INTERMEDIATE, Qkv
from benchmarks.options import DTYPES
from benchmarks.timing import measure
from lora_kernels.modules.blocks import register_block
from lora_kernels.testing import BudgetExceededError, assert_within_budget

TRAINING, DECODE = (1024, 256), (1, 2, 4, 8)
OFF, ON = "by itself", "together"
KIND = "grouped_lora_linear"
# block, adapted layers
CASES = (
    ("qkv", ("q_proj", "k_proj", "v_proj")),
    ("qkv", ("q_proj", "v_proj")),
    ("gate_up", ("gate_proj", "up_proj")),
)


class GateUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (
            nn.Linear(HIDDEN, INTERMEDIATE, bias=False) for _ in range(2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate_proj(x), self.up_proj(x)


BLOCKS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "qkv": (Qkv, ("q_proj", "k_proj", "v_proj")), "gate_up": (GateUp, ("gate_proj", "up_proj")),
}  # fmt: skip


@contextmanager
def _disabled(what: str) -> Iterator[None]:
    before = os.environ.get("LORA_KERNELS_DISABLE")
    os.environ["LORA_KERNELS_DISABLE"] = what
    try:
        yield
    finally:
        if before is None:
            del os.environ["LORA_KERNELS_DISABLE"]
        else:
            os.environ["LORA_KERNELS_DISABLE"] = before


def stock(block: str, adapted: tuple[str, ...], options: argparse.Namespace) -> nn.Module:
    """PEFT's block; the same values at every call, B not zero."""
    torch.manual_seed(0)
    cls, names = BLOCKS[block]
    register_block(cls, names, replace=True)
    lora = LoraConfig(
        r=options.rank, lora_alpha=options.rank, target_modules=list(adapted),
        init_lora_weights=False,
    )  # fmt: skip
    return get_peft_model(cls().to(DTYPES[options.dtype]), lora).train()


def sides(
    block: str, adapted: tuple[str, ...], options: argparse.Namespace
) -> dict[str, nn.Module]:
    off, on = (stock(block, adapted, options) for _ in range(2))
    with _disabled(KIND):
        lk.apply(off)
    (group,) = lk.apply(on).groups
    assert group["status"] == "fused", group["reason"]
    return {OFF: off, ON: on}


def step(model: nn.Module, x: Tensor, dys: list[Tensor]) -> list[Tensor]:
    """Outputs, dx and the gradients of the adapters."""
    x = x.detach().requires_grad_()
    outs = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [*outs, *torch.autograd.grad(outs, [x, *trained], dys)]


def forward(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def check(block: str, adapted: tuple[str, ...], options: argparse.Namespace) -> float:
    """Worst share of the error budget of both sides, for 256 rows."""
    x, dys = operands(block, 256, options)
    exact = step(stock(block, adapted, options).double(), x.double(), [t.double() for t in dys])
    low = step(stock(block, adapted, options), x, dys)
    shares = []
    for side, model in sides(block, adapted, options).items():
        for i, t in enumerate(step(model, x, dys)):
            margin = assert_within_budget(t.detach(), exact[i].detach(),
                                          low[i].detach().to(x.dtype), f"{side} {i}")  # fmt: skip
            shares.append(max(margin.max_norm, margin.rms))
    return max(shares)


def operands(block: str, rows: int, options: argparse.Namespace) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    x = torch.randn(rows, HIDDEN).to(DTYPES[options.dtype])
    cls, _ = BLOCKS[block]
    widths = [layer.out_features for layer in cls().children()]
    return x, [torch.randn(rows, n).to(x.dtype) for n in widths]


def rows_of(
    block: str, adapted: tuple[str, ...], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    models = sides(block, adapted, options)
    for m, training in [*((m, True) for m in TRAINING), *((m, False) for m in DECODE)]:
        x, dys = operands(block, m, options)
        works = {
            name: partial(step, model, x, dys) if training else partial(forward, model, x)
            for name, model in models.items()
        }  # fmt: skip
        timings = measure(works, OFF, rounds=options.rounds, round_seconds=0.02)
        t = timings[ON]
        row = {
            "block": block, "adapted": list(adapted), "M": m,
            "mode": "fwdbwd" if training else "fwd",
            "seconds": {name: timing.seconds.median for name, timing in timings.items()},
            "ratio": t.ratio.median, "ratio_iqr": [t.ratio.q1, t.ratio.q3],
        }  # fmt: skip
        print(f"{block} {','.join(adapted)} M={m} {row['mode']}: {OFF} "
              f"{1e3 * row['seconds'][OFF]:.3f} ms, {ON} {row['ratio']:.2f} of it "
              f"[{t.ratio.q1:.2f}, {t.ratio.q3:.2f}]", flush=True)  # fmt: skip
        yield row


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grouping")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<device>/...")
    options = parser.parse_args(argv)
    for name in ("rank", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: must be at least 1")
    return options


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    head = machine.describe("benchmarks.grouping", argv)
    rows, shares = [], []
    for block, adapted in CASES:
        try:
            shares.append(check(block, adapted, options))
        except BudgetExceededError as error:
            print(f"WRONG, not timed: {block}: {error}", file=sys.stderr)
            return 1
        rows += rows_of(block, adapted, options)
    result: dict[str, Any] = {
        "schema": record.SCHEMA, "op": "grouping", **head, "dtype": options.dtype,
        "rank": options.rank, "dropout": 0.0, "rounds": options.rounds,
        "share_of_error_budget": max(shares), "rows": rows,
    }  # fmt: skip
    record.keep(result, options.json, f"grouping-{options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
