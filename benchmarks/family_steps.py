"""Training steps of one small model per family: PEFT against lora_kernels.

    python -m benchmarks.family_steps [--family bert ...] [--size small] [--dtype bf16]
        [--batch 8] [--sequence 128] [--rank 16] [--rounds 9] [--json OUT]

Random weights, all linears adapted: forward, loss, backward, AdamW on the adapters, the providers
in turns. `tiny` is two layers of width 128, `small` two of 384, `base` two of 768; the models' own
dropout is off. That both compute the same is the business of tests/integrations/test_families.py.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_kernels as lk
from benchmarks import machine, record
from benchmarks.options import DTYPES, model_parser
from benchmarks.timing import measure

SIZES = {"tiny": (128, 4), "small": (384, 6), "base": (768, 12)}  # width, heads
LAYERS, CLASSES, VOCABULARY = 2, 4, 2048


def _decoder(width: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": heads,
        "num_key_value_heads": heads // 2, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def _encoder(width: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads,
        "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "num_labels": CLASSES,
        "pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


def _vision(width: int, heads: int) -> dict[str, Any]:
    return {
        k: v for k, v in _encoder(width, heads).items() if k not in ("vocab_size", "pad_token_id")
    }


def _gpt2(width: int, heads: int) -> dict[str, Any]:
    return {
        "n_embd": width, "n_layer": LAYERS, "n_head": heads, "vocab_size": VOCABULARY,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip


def _t5(width: int, heads: int) -> dict[str, Any]:
    return {
        "d_model": width, "d_kv": width // heads, "d_ff": 4 * width, "num_layers": LAYERS,
        "num_heads": heads, "vocab_size": VOCABULARY, "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
    }  # fmt: skip


def _whisper(width: int, heads: int) -> dict[str, Any]:
    return {
        "d_model": width, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
        "encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width, "num_mel_bins": 80,
        "encoder_attention_heads": heads, "decoder_attention_heads": heads,
        "vocab_size": VOCABULARY, "decoder_start_token_id": 1, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "max_source_positions": 512,
    }  # fmt: skip


Settings = Callable[[int, int], dict[str, Any]]
# family -> (model, config, its settings, kind of input)
FAMILIES: dict[str, tuple[str, str, Settings, str]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _decoder, "text"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _decoder, "text"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _gpt2, "text"),
    "bert": ("BertForSequenceClassification", "BertConfig", _encoder, "class"),
    "distilbert": (
        "DistilBertForSequenceClassification", "DistilBertConfig",
        lambda width, heads: {
            "dim": width, "hidden_dim": 4 * width, "n_layers": LAYERS, "n_heads": heads,
            "vocab_size": VOCABULARY, "num_labels": CLASSES, "dropout": 0.0,
            "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
        },
        "class",
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", _vision, "image"),
    "t5": ("T5ForConditionalGeneration", "T5Config", _t5, "pairs"),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _whisper, "speech"),
}  # fmt: skip


def inputs(kind: str, options: argparse.Namespace) -> dict[str, Tensor]:
    batch, sequence = options.batch, options.sequence
    ids, classes = torch.randint(3, VOCABULARY, (batch, sequence)), torch.randint(CLASSES, (batch,))
    if kind == "image":  # 196 patches and the class token, whatever the sequence
        return {"pixel_values": torch.randn(batch, 3, 224, 224), "labels": classes}
    if kind == "speech":
        return {"input_features": torch.randn(batch, 80, 1024), "labels": ids[:, : sequence // 2]}
    return {"input_ids": ids, "labels": classes if kind == "class" else ids}


def build(family: str, options: argparse.Namespace) -> nn.Module:
    """PEFT's model; the same values at every call, B not zero."""
    model, config, settings, _ = FAMILIES[family]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = getattr(hf, model)(getattr(hf, config)(**settings(*SIZES[options.size])))
        lora = LoraConfig(
            r=options.rank, lora_alpha=options.rank, target_modules="all-linear",
            init_lora_weights=False, fan_in_fan_out=family == "gpt2",
        )  # fmt: skip
        return get_peft_model(base.to(DTYPES[options.dtype]), lora).train()


def stepper(model: nn.Module, given: dict[str, Tensor]) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def run(family: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(1)
    dtype = DTYPES[options.dtype]
    given = {
        n: t.to(dtype) if t.is_floating_point() else t
        for n, t in inputs(FAMILIES[family][3], options).items()
    }
    fused = build(family, options)
    lk.apply(fused)
    works = {"peft": stepper(build(family, options), given), "lora_kernels": stepper(fused, given)}
    timings = measure(works, "peft", rounds=options.rounds, round_seconds=0.02)
    row: dict[str, Any] = {"family": family}
    for name, t in timings.items():
        row[f"{name}_seconds"] = t.seconds.median
    ratio = timings["lora_kernels"].ratio
    row |= {"ratio": ratio.median, "ratio_iqr": [ratio.q1, ratio.q3]}
    return row


def parse(argv: list[str]) -> argparse.Namespace:
    parser = model_parser("family_steps", batch=8, sequence=128, rank=16, rounds=9)
    parser.add_argument("--family", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--size", choices=list(SIZES), default="small")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    head = machine.describe("benchmarks.family_steps", argv)
    rows = []
    for family in options.family:
        row = run(family, options)
        rows.append(row)
        print(
            f"{family:12} PEFT {1e3 * row['peft_seconds']:8.1f} ms, "
            f"ours {1e3 * row['lora_kernels_seconds']:8.1f} ms, {row['ratio']:5.2f} of PEFT "
            f"[{row['ratio_iqr'][0]:.2f}, {row['ratio_iqr'][1]:.2f}]", flush=True,
        )  # fmt: skip
    result: dict[str, Any] = {
        "schema": record.SCHEMA, "op": "family_steps", **head, "dtype": options.dtype,
        "size": options.size, "batch": options.batch, "sequence": options.sequence,
        "rank": options.rank, "rounds": options.rounds, "rows": rows,
    }  # fmt: skip
    record.keep(result, options.json, f"family_steps-{options.size}-{options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
