"""An LSTM language model, pretrained on news and tuned to one subject through lk.LoRALSTM."""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import lora_kernels as lk

sys.path.append(str(Path(__file__).resolve().parents[1]))
from news_words import batches, held_out, read


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, data: list[Tensor]) -> float:
    return math.exp(sum(loss_of(model, b).item() for b in data) / len(data))


def train(model: nn.Module, data: list[Tensor], rate: float) -> int:
    """Number of trained parameters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    for batch in data:
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return sum(p.numel() for p in trained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--subject", default="sports")
    options = parser.parse_args()
    torch.manual_seed(0)
    general, special, rest, words = read(options.subject, options.vocabulary)
    length, rows = 32, 16
    data = held_out(rest, rows, length, most=10)
    model = LanguageModel(len(words), 128, options.hidden)
    train(model, batches(general, rows, length, options.pretrain_steps, 1), 3e-3)
    tuning = batches(special, rows, length, options.steps, 2)
    print(f"perplexity on {options.subject}, held out")
    print(f"  pretrained on other subjects  {perplexity(model, data):8.1f}")

    adapted = copy.deepcopy(model)
    lk.replace_modules(adapted, r=8, alpha=16, targets=["embed", "lstm", "head"])
    count = train(adapted, tuning, 3e-3)
    print(f"  LoRA on every layer           {perplexity(adapted, data):8.1f}  {count} trained")
    count = train(model, tuning, 1e-3)
    print(f"  all weights                   {perplexity(model, data):8.1f}  {count} trained")

    with tempfile.TemporaryDirectory() as folder:
        lk.save_adapter(adapted, folder)
        size = sum(p.stat().st_size for p in Path(folder).iterdir())
    lk.merge(adapted)
    print(f"  LoRA, merged                  {perplexity(adapted, data):8.1f}")
    print(f"the adapter is {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
