"""What a fine-tuning run is, as a tree of dataclasses. Every key of the YAML file is a field here.

Reading and checking lives in :mod:`lora_kernels.training.config_reader`; a field's metadata holds
its range and the sentence that the documentation shows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal


def about(help: str, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """Metadata of a field: its one-sentence meaning and its closed range [low, high]."""
    return {"help": help, "low": low, "high": high}


def needed(help: str) -> dict[str, Any]:
    """Metadata of a text that the user must give."""
    return {"help": help, "required": True}


@dataclass
class DataConfig:
    """Where the examples are and how they are split."""

    path: str = field(
        default="",
        metadata=needed(
            "csv, tsv or jsonl file, or a folder with one folder of .txt files per class"
        ),
    )
    validation: str | None = field(
        default=None, metadata=about("validation data; split off `path` when absent")
    )
    test: str | None = field(
        default=None, metadata=about("held-out test data; split off `path` when absent")
    )
    text: str | None = field(
        default=None, metadata=about("name of the text column; guessed and shown when absent")
    )
    label: str | None = field(
        default=None, metadata=about("name of the label column; guessed and shown when absent")
    )
    validation_fraction: float = field(
        default=0.1, metadata=about("share split off for validation", low=0.0, high=0.9)
    )
    test_fraction: float = field(
        default=0.2, metadata=about("share split off for the test", low=0.0, high=0.9)
    )
    limit: int | None = field(
        default=None, metadata=about("use about this many examples of `path`, evenly", low=2)
    )
    max_length: int = field(
        default=128, metadata=about("tokens per text; longer texts are cut", low=2)
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


@dataclass
class TrainConfig:
    """What transformers.Trainer is told."""

    epochs: float = field(default=3.0, metadata=about("passes over the training data", low=0.0))
    max_steps: int = field(
        default=-1, metadata=about("optimizer steps; overrides epochs when positive", low=-1)
    )
    batch_size: int = field(default=16, metadata=about("texts per step", low=1))
    eval_batch_size: int = field(default=64, metadata=about("texts per evaluation step", low=1))
    gradient_accumulation: int = field(
        default=1, metadata=about("batches per optimizer step", low=1)
    )
    learning_rate: float = field(
        default=5e-4, metadata=about("peak learning rate of AdamW", low=0.0)
    )
    weight_decay: float = field(default=0.0, metadata=about("AdamW's weight decay", low=0.0))
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
    checkpointing: bool = field(
        default=False, metadata=about("recompute activations in the backward pass")
    )


@dataclass
class Config:
    """One fine-tuning run."""

    task: Literal["classification"] = field(
        default="classification", metadata=about("what the model learns")
    )
    model: str = field(
        default="", metadata=needed("folder, `package:NAME[/FOLDER]`, or a name on the model hub")
    )
    output: str = field(
        default="", metadata=needed("folder to write; an earlier run there is replaced")
    )
    seed: int = field(
        default=0, metadata=about("of the split, the head, the adapter and the data order", low=0)
    )
    threads: int | None = field(
        default=None, metadata=about("CPU threads; torch's own choice when absent", low=1)
    )
    precision: Literal["auto", "fp32", "bf16"] = field(
        default="auto",
        metadata=about("bf16 needs hardware support to be fast; auto asks the hardware"),
    )
    attention: Literal["auto", "eager", "sdpa"] = field(
        default="auto", metadata=about("transformers' attention implementation")
    )
    kernels: bool = field(default=True, metadata=about("fuse the adapters with lora_kernels.apply"))
    compare_stock: bool = field(
        default=False, metadata=about("train once more with stock PEFT, for the report")
    )
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """As nested dictionaries, in the order of the fields."""
        return asdict(self)
