"""The sections of a configuration: data, adapter, quantization, freezing, training, decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def about(help: str, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """Metadata of a field: its one-sentence meaning and its closed range [low, high]."""
    return {"help": help, "low": low, "high": high}


def needed(help: str) -> dict[str, Any]:
    """Metadata of a text that the user must give."""
    return {"help": help, "required": True}


def _column(what: str) -> Any:
    return field(
        default=None, metadata=about(f"name of the {what} column; guessed and shown when absent")
    )


@dataclass
class DataConfig:
    """Where the examples are, how they are split, and how they become tokens."""

    path: str = field(
        default="",
        metadata=needed(
            "csv, tsv, jsonl, parquet or txt file, a folder with one folder of .txt files per "
            "class, or a folder that datasets.save_to_disk wrote"
        ),
    )
    validation: str | None = field(
        default=None, metadata=about("validation data; split off `path` when absent")
    )
    test: str | None = field(
        default=None, metadata=about("held-out test data; split off `path` when absent")
    )
    text: str | None = _column("text")
    label: str | None = _column("label")
    source: str | None = _column("seq2seq source")
    target: str | None = _column("seq2seq target")
    prompt: str | None = _column("instruction")
    response: str | None = _column("answer to the instruction")
    messages: str | None = _column("chat messages")
    question: str | None = _column("question")
    context: str | None = _column("context of the question")
    answers: str | None = _column("answers to the question")
    tokens: str | None = _column("words of a labelled sentence")
    tags: str | None = _column("words' labels")
    validation_fraction: float = field(
        default=0.1, metadata=about("share split off for validation", low=0.0, high=0.9)
    )
    test_fraction: float = field(
        default=0.2, metadata=about("share split off for the test", low=0.0, high=0.9)
    )
    limit: int | None = field(
        default=None, metadata=about("use about this many examples of `path`, evenly", low=2)
    )
    encoding: str = field(default="utf-8", metadata=about("encoding of the text files"))
    bad_bytes: Literal["auto", "refuse", "replace"] = field(
        default="auto",
        metadata=about(
            "what to do with bytes outside the encoding; auto refuses them in a file, and replaces "
            "and counts them in a folder of texts"
        ),
    )
    max_length: int = field(
        default=128, metadata=about("tokens per example, prompt and answer together", low=2)
    )
    max_target_length: int = field(default=128, metadata=about("tokens per seq2seq target", low=2))
    too_long: Literal["cut", "refuse"] = field(
        default="cut", metadata=about("longer examples are cut and counted, or refused")
    )
    documents: Literal["auto", "line", "block", "file"] = field(
        default="auto",
        metadata=about(
            "what one document of a .txt file is; auto: a block between blank lines, or a line "
            "where there are no blank lines"
        ),
    )
    packing: Literal["auto", "documents", "stream", "none"] = field(
        default="auto",
        metadata=about(
            "causal-lm: fill rows with whole documents that do not see each other, cut one stream "
            "of text into rows, or one padded document per row; auto: documents where the model "
            "keeps them apart, else none"
        ),
    )
    stride: int = field(
        default=32,
        metadata=about("question-answering: tokens that two windows of a context share", low=0),
    )
    mask_probability: float = field(
        default=0.15, metadata=about("masked-lm: share of the tokens to guess", low=0.01, high=0.9)
    )
    label_all_pieces: bool = field(
        default=False,
        metadata=about("token-classification: every word piece has the label, not the first alone"),
    )
    prefix: str = field(
        default="", metadata=about("seq2seq: text before every source, as T5 expects it")
    )
    source_language: str | None = field(
        default=None, metadata=about("seq2seq: the tokenizer's code of the source language")
    )
    target_language: str | None = field(
        default=None, metadata=about("seq2seq: the tokenizer's code of the target language")
    )


@dataclass
class LoraConfig:
    """The adapter, in PEFT's terms."""

    r: int = field(default=16, metadata=about("rank", low=1))
    alpha: int = field(default=32, metadata=about("the update is scaled by alpha / r", low=0))
    dropout: float = field(
        default=0.0, metadata=about("dropout on the input of the adapter", low=0.0, high=1.0)
    )
    rslora: bool = field(default=False, metadata=about("scale by alpha / sqrt(r) instead"))
    targets: str | list[str] = field(
        default="all-linear", metadata=about("module names, a regular expression, or all-linear")
    )
    exclude: list[str] = field(
        default_factory=list, metadata=about("names of modules that get no adapter")
    )
    modules_to_save: list[str] = field(
        default_factory=list,
        metadata=about("modules that train as a whole, besides the head of the task"),
    )


@dataclass
class QuantConfig:
    """How method qlora stores the frozen weights."""

    format: str | None = field(
        default=None,
        metadata=about("format of the frozen weights, as lora_kernels.ops.quantize; when absent "
                       "nf4, and of a model that is quantized already its own"),
    )  # fmt: skip
    block_size: int | None = field(
        default=None,
        metadata=about("weights that share a scale; the format's own when absent", low=1),
    )
    double_quant: bool | None = field(
        default=None,
        metadata=about("quantize the scales too; as the format has it when absent"),
    )


@dataclass
class FreezeConfig:
    """What method freeze leaves trainable."""

    layers: int = field(
        default=2, metadata=about("the last layers that train; of a seq2seq model the decoder's",
                                  low=0)
    )  # fmt: skip
    modules: list[str] = field(
        default_factory=list, metadata=about("names of modules that train, instead of layers")
    )


@dataclass
class TrainConfig:
    """What transformers.Trainer is told."""

    epochs: float = field(default=3.0, metadata=about("passes over the training data", low=0.0))
    max_steps: int = field(
        default=-1, metadata=about("optimizer steps; overrides epochs when positive", low=-1)
    )
    batch_size: int = field(default=16, metadata=about("examples per step and device", low=1))
    eval_batch_size: int | None = field(
        default=None,
        metadata=about(
            "examples per evaluation step; when absent 64, or batch_size for language models", low=1
        ),
    )
    gradient_accumulation: int = field(
        default=1, metadata=about("batches per optimizer step", low=1)
    )
    learning_rate: float = field(
        default=5e-4, metadata=about("peak learning rate of AdamW", low=0.0)
    )
    loraplus_ratio: float | None = field(
        default=None, metadata=about("LoRA+: B learns this many times faster than A", low=1.0)
    )
    weight_decay: float = field(default=0.0, metadata=about("AdamW's weight decay", low=0.0))
    max_grad_norm: float = field(
        default=1.0, metadata=about("gradients are clipped to this norm; 0: never", low=0.0)
    )
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = field(
        default="linear", metadata=about("learning-rate schedule")
    )
    lr_warmup: float = field(
        default=0.1,
        metadata=about("share of the steps over which the rate rises", low=0.0, high=0.9),
    )
    base_dropout: float | None = field(
        default=None,
        metadata=about("dropout inside the base model; its own rates when absent", 0.0, 1.0),
    )
    label_smoothing: float = field(
        default=0.0, metadata=about("share of the target spread over all classes", 0.0, 0.9)
    )
    checkpointing: bool = field(
        default=False, metadata=about("recompute activations in the backward pass")
    )
    eval_steps: int | None = field(
        default=None, metadata=about("steps between validations; once per epoch when absent", low=1)
    )
    save_steps: int | None = field(
        default=None,
        metadata=about("steps between checkpoints; none are written when absent", low=1),
    )
    save_total_limit: int | None = field(
        default=None, metadata=about("checkpoints to keep; all when absent", low=1)
    )
    keep_best: bool = field(
        default=False,
        metadata=about("end with the checkpoint that was best in validation, not with the last"),
    )
    early_stopping: int | None = field(
        default=None,
        metadata=about("stop after this many validations without a better one; keeps the best",
                       low=1),
    )  # fmt: skip


@dataclass
class GenerationConfig:
    """How a seq2seq model writes its answers."""

    beams: int = field(default=1, metadata=about("width of the beam search; 1: greedy", low=1))
    length_penalty: float = field(
        default=1.0, metadata=about("above 1 a beam search prefers longer answers")
    )
