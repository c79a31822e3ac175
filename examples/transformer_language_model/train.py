"""A Transformer language model, pretrained briefly and tuned by freezing and by LoRA, compared.

4 layers, d_model 512, 8 heads, d_ff 2048, vocabulary 10 000, length 128. Where PEFT is installed,
its layers train as well, from other random numbers.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import lora_kernels as lk

sys.path.append(str(Path(__file__).resolve().parents[1]))
from news_words import batches, held_out, read

LENGTH, HEADS, LAYERS = 128, 8, 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q, k, v = (
            layer(h).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for table in (self.embed, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.places(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, data: list[Tensor]) -> float:
    return math.exp(sum(loss_of(model, b).item() for b in data) / len(data))


def train(model: nn.Module, data: list[Tensor], rate: float) -> tuple[int, float]:
    """(trained parameters, seconds per step)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    warm = max(len(data) // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / warm))
    start = time.perf_counter()
    for batch in data:
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = (time.perf_counter() - start) / max(len(data), 1)
    return sum(p.numel() for p in trained), seconds


def adapted(base: nn.Module, stock: bool = False) -> nn.Module:
    """A copy with rank 16 on the linear layers of its blocks."""
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    if not stock:
        lk.replace_modules(model, r=16, alpha=32, exclude=["head"])
        return model
    import peft

    names = ["query", "key", "value", "output", "up", "down"]
    return peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrain-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--subject", default="sports")
    options = parser.parse_args()
    torch.manual_seed(0)
    general, special, rest, words = read(options.subject, options.vocabulary)
    data = held_out(rest, options.rows, LENGTH, most=6)
    base = LanguageModel(len(words), options.width)
    train(base, batches(general, options.rows, LENGTH, options.pretrain_steps, 1), 5e-4)
    tuning = batches(special, options.rows, LENGTH, options.steps, 2)
    line = "{:<34}{:>12}{:>13}{:>10}"
    print(line.format(f"tuned to {options.subject}", "perplexity", "trained", "s/step"))
    print(line.format("not at all", f"{perplexity(base, data):.1f}", "0", "-"))

    frozen = copy.deepcopy(base).requires_grad_(False)
    for part in (frozen.layers[-1], frozen.norm):
        part.requires_grad_(True)
    ways = [
        ("freeze: the last layer trains", frozen, 5e-4),
        ("lora: r = 16 on all linear layers", adapted(base), 2e-3),
        ("full: everything trains", copy.deepcopy(base), 5e-4),
    ]
    if importlib.util.find_spec("peft") is not None:
        ways.insert(2, ("lora: the same by stock PEFT", adapted(base, stock=True), 2e-3))
    for name, model, rate in ways:
        count, seconds = train(model, tuning, rate)
        found = f"{perplexity(model, data):.1f}"
        print(line.format(name, found, f"{count:,}".replace(",", " "), f"{seconds:.2f}"))


if __name__ == "__main__":
    main()
