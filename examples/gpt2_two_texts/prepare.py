"""News and Bible as jsonl, and a small GPT-2 with random weights and a tokenizer of its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).resolve().parents[1]))
from packaged_texts import chapters, news, write_rows

END = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/gpt2_two_texts_data"))
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    articles, books = [text for _, _, text in news()], chapters()
    write_rows(options.folder / "news.jsonl", ({"text": text} for text in articles))
    write_rows(options.folder / "bible.jsonl", ({"text": text} for text in books))

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        articles + books[::4], options.vocabulary, special_tokens=[END], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token=END, bos_token=END, pad_token=END
    )
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=256, n_embd=options.width,
            n_layer=options.layers, n_head=4, bos_token_id=end, eos_token_id=end, pad_token_id=end,
        )
    )  # fmt: skip
    model.save_pretrained(options.folder / "model")
    tokenizer.save_pretrained(options.folder / "model")
    print(f"{options.folder / 'model'}: {model.num_parameters()} random parameters")


if __name__ == "__main__":
    main()
