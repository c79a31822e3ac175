"""A small T5 with random weights and a tokenizer learnt from the texts at hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import SentencePieceUnigramTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def write_small_t5(
    folder: Path, texts: Iterable[str], vocabulary: int, width: int, layers: int
) -> None:
    """A model folder for ``from_pretrained``."""
    trained = SentencePieceUnigramTokenizer()
    trained.train_from_iterator(
        texts, vocabulary, special_tokens=[PAD, END, UNKNOWN], unk_token=UNKNOWN,
        show_progress=False,
    )  # fmt: skip
    trained._tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, trained.token_to_id(END))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=width // 4, d_ff=4 * width, num_heads=4,
            num_layers=layers, pad_token_id=tokenizer.pad_token_id, dropout_rate=0.0,
            eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters()} random parameters, {len(tokenizer)} tokens")
