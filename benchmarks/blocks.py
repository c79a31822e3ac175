"""A LoRA QKV and a LoRA MLP block of SmolLM2's size against PEFT and torch.compile of it.

    python -m benchmarks.blocks [--block qkv] [--dtype bf16] [--rows 1024] [--rank 16]
        [--dropout 0] [--rounds 8] [--no-compile] [--json OUT]

Forward and backward, in turns; a record for each block and dtype. Before any time is taken, every
result and gradient is held to an fp64 oracle (without dropout). PEFT keeps adapters in fp32 over a
bf16 base; so do ours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_kernels as lk
from benchmarks import machine, record
from benchmarks.options import DTYPES
from benchmarks.timing import measure
from lora_kernels.modules.blocks import register_block
from lora_kernels.testing import BudgetExceededError, assert_within_budget

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE = 576, 9, 3, 1536  # SmolLM2-135M
NAMES = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


class Qkv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        kv = HIDDEN // HEADS * KV_HEADS
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(HIDDEN, n, bias=False) for n in (HIDDEN, kv, kv)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def stock(block: str, options: argparse.Namespace) -> nn.Module:
    """PEFT's block; the same values at every call, B not zero."""
    torch.manual_seed(0)
    model = (Qkv() if block == "qkv" else Mlp()).to(DTYPES[options.dtype])
    lora = LoraConfig(
        r=options.rank, lora_alpha=options.rank, lora_dropout=options.dropout,
        target_modules=list(NAMES[block]), init_lora_weights=False,
    )  # fmt: skip
    return get_peft_model(model, lora).train()


def ours(block: str, options: argparse.Namespace, recompute: bool = False) -> nn.Module:
    """Our module with the values of :func:`stock`."""
    source = stock(block, options).base_model.model
    layers = []
    for name in NAMES[block]:
        layer = getattr(source, name)
        made = lk.LoRALinear.from_linear(
            layer.base_layer, options.rank, options.rank, options.dropout
        )
        with torch.no_grad():
            made.lora_A.copy_(layer.lora_A["default"].weight)
            made.lora_B.copy_(layer.lora_B["default"].weight)
        layers.append(made)
    if block == "mlp":
        return lk.LoRAMLP.from_layers(*layers, "silu", recompute=recompute).train()
    return lk.LoRAQKV.from_layers(*layers, num_heads=HEADS, num_kv_heads=KV_HEADS).train()


def providers(block: str, options: argparse.Namespace) -> dict[str, nn.Module]:
    applied = stock(block, options)
    register_block(
        type(applied.base_model.model), NAMES[block][: 3 if block == "qkv" else 2], replace=True
    )
    lk.apply(applied)
    found = {"peft": stock(block, options)}
    if options.compile:
        found["torch.compile(peft)"] = torch.compile(stock(block, options))
    found["lora_kernels.apply"] = applied
    if block == "qkv":
        return found | {"LoRAQKV": ours(block, options)}
    return found | {
        "LoRAMLP": ours(block, options),
        "LoRAMLP, recompute": ours(block, options, recompute=True),
    }


def step(model: Callable[[Tensor], Any], x: Tensor, dys: list[Tensor]) -> None:
    x = x.detach().requires_grad_()
    y = model(x)
    outs = [y] if isinstance(y, Tensor) else [t.flatten(x.dim() - 1) for t in y]
    torch.autograd.backward(outs, dys)


def results(model: nn.Module, x: Tensor, dys: list[Tensor]) -> list[Tensor]:
    """Outputs, dx, and dA and dB of every layer, in one order for PEFT's modules and ours."""
    x = x.detach().requires_grad_()
    y = model(x)
    outs = [y] if isinstance(y, Tensor) else [t.flatten(x.dim() - 1) for t in y]
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(outs, [x, *trained], dys)
    return [*(t.detach() for t in outs), *grads]


def check(block: str, options: argparse.Namespace, x: Tensor, dys: list[Tensor]) -> float:
    """Worst share of the error budget of all providers but PEFT."""
    exactly = argparse.Namespace(**{**vars(options), "dropout": 0.0, "compile": False})
    models = providers(block, exactly)
    oracle = results(stock(block, exactly).double(), x.double(), [t.double() for t in dys])
    low = results(models.pop("peft"), x, dys)
    shares = []
    for name, model in models.items():
        for i, (t, exact, plain) in enumerate(
            zip(results(model, x, dys), oracle, low, strict=True)
        ):
            margin = assert_within_budget(t, exact, plain.to(x.dtype), f"{name} {i}")
            shares.append(max(margin.max_norm, margin.rms))
    return max(shares)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocks")
    parser.add_argument("--block", choices=sorted(NAMES), help="default: both")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<device>/...")
    options = parser.parse_args(argv)
    for name in ("rows", "rank", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: must be at least 1")
    return options


def operands(block: str, options: argparse.Namespace) -> tuple[Tensor, list[Tensor]]:
    """x and the gradients of the outputs."""
    torch.manual_seed(1)
    x = torch.randn(options.rows, HIDDEN).to(DTYPES[options.dtype])
    kv = HIDDEN // HEADS * KV_HEADS
    widths = (HIDDEN, kv, kv) if block == "qkv" else (HIDDEN,)
    return x, [torch.randn(options.rows, n).to(x.dtype) for n in widths]


def run(block: str, options: argparse.Namespace) -> tuple[float, list[dict[str, Any]]]:
    """(share of the error budget, a row per provider); BudgetExceededError before any timing."""
    x, dys = operands(block, options)
    share = check(block, options, x, dys)
    works = {
        name: lambda m=model: step(m, x, dys) for name, model in providers(block, options).items()
    }
    timings = measure(works, "peft", rounds=options.rounds, round_seconds=0.05)
    print(f"{block}, {options.dtype}: correct, at most {share:.2f} of the error budget")
    rows = []
    for name, t in timings.items():
        print(f"  {name:22} {1e3 * t.seconds.median:9.2f} ms  {t.ratio.median:6.2f} of PEFT")
        rows.append({
            "provider": name, "seconds": t.seconds.median,
            "iqr_seconds": [t.seconds.q1, t.seconds.q3], "ratio": t.ratio.median,
            "ratio_iqr": [t.ratio.q1, t.ratio.q3], "first_call_seconds": t.first_call,
        })  # fmt: skip
    return share, rows


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    found, blocks = [], [options.block] if options.block else list(NAMES)
    for block in blocks:
        head = machine.describe("benchmarks.blocks", argv)
        try:
            share, rows = run(block, options)
        except BudgetExceededError as error:
            print(f"WRONG, not timed: {block}: {error}", file=sys.stderr)
            return 1
        found.append({
            "schema": record.SCHEMA, "op": "blocks", **head, "block": block,
            "dtype": options.dtype, "M": options.rows, "rank": options.rank,
            "dropout": options.dropout, "rounds": options.rounds,
            "share_of_error_budget": share, "rows": rows,
        })  # fmt: skip
    for result in found:
        path = options.json
        if path and len(found) > 1:
            path = path.with_name(f"{path.stem}-{result['block']}{path.suffix}")
        record.keep(result, path, f"blocks-{result['block']}-{result['dtype']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
