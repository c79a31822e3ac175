"""Tiny random models of every kind with tokenizers over a small vocabulary, and data for each task.

Nothing is downloaded. The tasks can be learnt in a few dozen steps.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

NAMES = ["anna", "bert", "carl", "dora", "emil", "fritz"]
CITIES = ["rome", "oslo", "bern", "kiev", "lima", "cork"]
VERBS = ["visits", "leaves", "likes", "paints"]
FILLERS = ["the", "old", "new", "town", "of", "today", "again", "and", "then", "quickly"]
MARKS = ["who", "where", "is", "in", "?", ".", "does", "travel", "to", "from"]
COLORS = ["red", "blue", "green"]
WORDS = [*NAMES, *CITIES, *VERBS, *FILLERS, *MARKS, *COLORS]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }} {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)


def write_word_tokenizer(folder: Path, chat: bool = False, mask: bool = False) -> int:
    """A tokenizer of whole words; the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "</s>", "<|start|>", "<|end|>", "<mask>"]
    words = [*special, "user", "assistant", "system", *WORDS]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        additional_special_tokens=["<|start|>", "<|end|>"], mask_token="<mask>" if mask else None,
    )  # fmt: skip
    if chat:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    return len(words)


def write_llama(folder: Path, chat: bool = False, **shape: Any) -> Path:
    """Two layers, grouped-query attention, rotary positions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = write_word_tokenizer(folder, chat)
    torch.manual_seed(0)
    options = {
        "vocab_size": size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.1, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**options, **shape})).save_pretrained(str(folder))
    return folder


def write_gpt2(folder: Path) -> Path:
    """Two layers of Conv1D, learnt positions, biases."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    size = write_word_tokenizer(folder)
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.1,
        pad_token_id=0, eos_token_id=2, bos_token_id=2,
    )  # fmt: skip
    GPT2LMHeadModel(shape).save_pretrained(str(folder))
    return folder


def write_t5(folder: Path) -> Path:
    """An encoder and a decoder of two layers each."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    size = write_word_tokenizer(folder)
    torch.manual_seed(0)
    shape = T5Config(
        vocab_size=size, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, dropout_rate=0.0,
    )  # fmt: skip
    T5ForConditionalGeneration(shape).save_pretrained(str(folder))
    return folder


def write_bert(folder: Path, **shape: Any) -> Path:
    """A two-layer BERT whose word pieces cut the cities in two, without any head."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [w for w in WORDS if w not in CITIES]
    words += sorted({c[:2] for c in CITIES} | {"##" + c[2:] for c in CITIES})
    BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}).save_pretrained(str(folder))
    torch.manual_seed(0)
    options = {
        "vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
        "initializer_range": 0.1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    BertModel(BertConfig(**{**options, **shape})).save_pretrained(str(folder))
    return folder


def sentences(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """(name, verb, city) drawn at random."""
    draw = random.Random(seed)
    return [(draw.choice(NAMES), draw.choice(VERBS), draw.choice(CITIES)) for _ in range(count)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def write_data(task: str, folder: Path, count: int = 48) -> Path:
    """A file for `task`; ``chat`` stands for causal-lm on conversations."""
    drawn = sentences(count)
    if task in ("causal-lm", "masked-lm"):
        path = folder / "texts.txt"
        path.write_text("".join(f"{a} {v} {c} . {a} is in {c} .\n" for a, v, c in drawn))
        return path
    if task == "chat":
        rows = [
            {"messages": [
                {"role": "user", "content": f"{a} {v} {c} . where is {a} ?"},
                {"role": "assistant", "content": f"in {c} ."},
            ]}
            for a, v, c in drawn
        ]  # fmt: skip
    elif task == "seq2seq":
        rows = [
            {"id": i, "source": f"{a} {v} {c}", "target": f"{c} {v} {a}"}
            for i, (a, v, c) in enumerate(drawn)
        ]
    elif task == "question-answering":
        rows = []
        for i, (a, v, c) in enumerate(drawn):
            context = f"{'the old town again and ' * (i % 4)}{a} {v} {c} today"
            answers = {"text": [c], "answer_start": [context.rindex(c)]}
            rows.append({"question": f"where is {a} ?", "context": context, "answers": answers})
    elif task == "token-classification":
        rows = [
            {"tokens": [a, v, c, "."], "ner_tags": ["B-PER", "O", "B-LOC", "O"]}
            for a, v, c in drawn
        ]
    else:
        rows = [{"text": f"{a} {v} {c}", "label": "near" if c < "l" else "far"}
                for a, v, c in drawn]  # fmt: skip
    return write_jsonl(folder / f"{task}.jsonl", rows)


def task_config(task: str, model: Path, data: Path, output: Path, **train: Any) -> dict[str, Any]:
    """A configuration that trains in a second."""
    sizes: dict[str, Any] = {"path": str(data), "max_length": 32}
    if task == "seq2seq":
        sizes["max_target_length"] = 5
    if task == "question-answering":
        sizes |= {"max_length": 24, "stride": 6}
    return {
        "task": "causal-lm" if task == "chat" else task,
        "model": str(model),
        "output": str(output),
        "precision": "fp32",
        "data": sizes,
        "lora": {"r": 4, "alpha": 8},
        "train": {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-2, **train},
    }
