"""A whole training step of a SmolLM2-135M-shaped Llama, all linears adapted, against stock PEFT.

    python -m benchmarks.smollm2_step [--dtype bf16] [--batch 4] [--sequence 128] [--rank 16]
        [--dropout 0] [--rounds 8] [--json OUT]

Models from one seed - stock, through ``lk.apply``, the same with ``fused_loss=True``, and that with
``attn_implementation="lora_kernels"`` - take turns on the same batches: forward, loss, backward,
AdamW on the adapters. The weights are random; the arithmetic does not depend on them. Before any
time is taken, loss and every adapter gradient of a two-layer model of these widths are held to an
fp64 oracle.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk
from benchmarks import machine, record
from benchmarks.options import DTYPES, model_parser
from benchmarks.timing import measure
from lora_kernels.testing import BudgetExceededError, assert_within_budget
from lora_kernels.testing.attention import FACTOR, GRADIENT_FACTOR

SHAPE = {
    "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 2048,
}  # fmt: skip
LAYERS = 30
PROVIDERS = (
    "peft", "lora_kernels", "lora_kernels, fused loss", "lora_kernels, loss and attention",
)  # fmt: skip


def build(options: argparse.Namespace, layers: int, dtype: torch.dtype) -> nn.Module:
    """The same random model at every call; B is not zero. PEFT keeps the adapter in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers, tie_word_embeddings=True, use_cache=False, **SHAPE
    )
    model = LlamaForCausalLM(config).to(DTYPES[options.dtype])
    lora = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank,
        lora_dropout=options.dropout,
        target_modules="all-linear",
        init_lora_weights=False,
    )
    made = get_peft_model(model, lora).train()
    return made.double() if dtype == torch.float64 else made


def batches(options: argparse.Namespace, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, options.batch, options.sequence)
    return torch.randint(SHAPE["vocab_size"], shape, generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Next-token cross-entropy as transformers has it, in fp32; in fp64 for the oracle."""
    if next(model.parameters()).dtype != torch.float64:
        return model(input_ids=tokens, labels=tokens).loss
    logits = model(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    loss = loss_of(model, tokens)
    loss.backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **named}


def check(options: argparse.Namespace) -> float:
    """Worst share of the error budget over loss and gradients; without dropout."""
    options = argparse.Namespace(**{**vars(options), "dropout": 0.0})
    tokens = batches(options, 1)[0]
    dtype = DTYPES[options.dtype]
    oracle = gradients(build(options, 2, torch.float64), tokens)
    plain = gradients(build(options, 2, dtype), tokens)
    fused = build(options, 2, dtype)
    lk.apply(fused, fused_loss=True)
    shares = []
    for attention, factor in (("sdpa", FACTOR), (lk.register_attention(), GRADIENT_FACTOR)):
        fused.set_attn_implementation(attention)
        for name, t in gradients(fused, tokens).items():
            margin = assert_within_budget(t, oracle[name], plain[name].to(dtype), name, factor)
            shares.append(max(margin.max_norm, margin.rms))
        fused.zero_grad()
    return max(shares)


class Trainer:
    """One model with its optimizer; every call is a step on the next batch."""

    def __init__(self, model: nn.Module, data: Tensor) -> None:
        self.model, self.data, self.steps = model, data, 0
        self.losses: list[float] = []
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-4
        )

    def step(self) -> None:
        loss = loss_of(self.model, self.data[self.steps % len(self.data)])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.steps += 1


def parse(argv: list[str]) -> argparse.Namespace:
    parser = model_parser("smollm2_step", batch=4, sequence=128, rank=16, rounds=8, layers=LAYERS)
    parser.add_argument("--dropout", type=float, default=0.0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    try:
        share = check(options)
    except BudgetExceededError as error:
        print(f"WRONG, not timed: {error}", file=sys.stderr)
        return 1
    print(f"correct: loss and gradients use at most {share:.2f} of the error budget")
    data = batches(options, 4)
    models = {name: build(options, options.layers, DTYPES[options.dtype]) for name in PROVIDERS}
    report = lk.apply(models["lora_kernels"])
    for name in PROVIDERS[2:]:
        lk.apply(models[name], fused_loss=True)
    models[PROVIDERS[3]].set_attn_implementation(lk.register_attention())
    trainers = {name: Trainer(model, data) for name, model in models.items()}
    timings = measure(
        {name: trainer.step for name, trainer in trainers.items()},
        "peft",
        rounds=options.rounds,
        round_seconds=0.0,
        warm_up=2,
    )
    layers = report.to_dict()["layers"]
    fused = sum(layer["status"] == "fused" for layer in layers)
    result: dict[str, Any] = {
        "schema": record.SCHEMA, "op": "smollm2_step",
        **machine.describe("benchmarks.smollm2_step", argv),
        "rank": options.rank, "dropout": options.dropout, "rounds": options.rounds,
        "dtype": options.dtype, "batch": options.batch, "sequence": options.sequence,
        "layers": options.layers, "fused_layers": fused, "total_layers": len(layers),
        "share_of_error_budget": share,
        "rows": [
            {
                "provider": name,
                "seconds": t.seconds.median,
                "iqr_seconds": [t.seconds.q1, t.seconds.q3],
                "ratio": t.ratio.median,
                "ratio_iqr": [t.ratio.q1, t.ratio.q3],
                "first_call_seconds": t.first_call,
                "losses": trainers[name].losses,
            }
            for name, t in timings.items()
        ],
    }  # fmt: skip
    print(f"{'provider':34} {'s/step':>8} {'IQR':>15} {'ratio':>6} {'first loss':>11} {'last':>8}")
    for row in result["rows"]:
        low, high = row["iqr_seconds"]
        print(
            f"{row['provider']:34} {row['seconds']:8.3f} {low:7.3f}-{high:<7.3f} "
            f"{row['ratio']:6.2f} {row['losses'][0]:11.4f} {row['losses'][-1]:8.4f}"
        )
    gains = [f"{1.0 / row['ratio']:.2f}x ({row['provider']})" for row in result["rows"][1:]]
    print(f"speed-up {', '.join(gains)}; {fused} of {len(layers)} layers fused")
    record.keep(result, options.json, f"smollm2_step-{options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
