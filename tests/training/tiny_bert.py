"""A tiny random BERT with a WordPiece tokenizer, and texts of two topics, made on the spot."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = {
    "sport": [
        "match",
        "goal",
        "striker",
        "cup",
        "league",
        "coach",
        "pitch",
        "player",
        "season",
        "referee",
    ],
    "money": [
        "bank",
        "shares",
        "profit",
        "market",
        "price",
        "trade",
        "bond",
        "tax",
        "growth",
        "revenue",
    ],
}
COMMON = ["the", "a", "of", "in", "was", "new", "last", "year", "said", "will", "more", "after"]


def make_texts(per_class: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label) pairs; every text has words of its topic, so the task can be learnt."""
    generator = random.Random(seed)
    pairs = []
    for label, words in WORDS.items():
        for _ in range(per_class):
            drawn = generator.choices(words, k=4) + generator.choices(COMMON, k=4)
            generator.shuffle(drawn)
            pairs.append((" ".join(drawn), label))
    return pairs


def write_csv(path: Path, pairs: list[tuple[str, str]]) -> Path:
    lines = ["text,label", *(f"{text},{label}" for text, label in pairs)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_model(folder: Path, hidden: int = 32) -> Path:
    """A two-layer BERT and its tokenizer, as a folder that from_pretrained loads."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [*WORDS["sport"], *WORDS["money"], *COMMON]
    vocabulary = {word: number for number, word in enumerate(words)}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(str(folder))
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(words), hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=32, initializer_range=0.1,
    )  # fmt: skip
    BertModel(shape).save_pretrained(str(folder))
    return folder


def tiny_config(model: Path, data: Path, output: Path, **train: object) -> dict[str, object]:
    """A configuration that trains in a second or two."""
    return {
        "model": str(model),
        "output": str(output),
        "precision": "fp32",
        "data": {"path": str(data), "max_length": 16},
        "lora": {"r": 4, "alpha": 8},
        "train": {"max_steps": 4, "batch_size": 8, "learning_rate": 1e-2, **train},
    }
