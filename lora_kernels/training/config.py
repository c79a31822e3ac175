"""What a fine-tuning run is, as a tree of dataclasses. Every key of the YAML file is a field here.

Reading and checking lives in :mod:`lora_kernels.training.config_reader`; a field's metadata holds
its range and the sentence that ``lora-kernels train --help`` and the documentation show.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lora_kernels.training.config_sections import (
    DataConfig,
    FreezeConfig,
    GenerationConfig,
    LoraConfig,
    QuantConfig,
    TrainConfig,
    about,
    needed,
)

__all__ = [
    "Config",
    "DataConfig",
    "FreezeConfig",
    "GenerationConfig",
    "LoraConfig",
    "QuantConfig",
    "TrainConfig",
]


@dataclass
class Config:
    """One fine-tuning run."""

    task: Literal[
        "classification",
        "causal-lm",
        "masked-lm",
        "seq2seq",
        "question-answering",
        "token-classification",
    ] = field(default="classification", metadata=about("what the model learns"))
    model: str = field(
        default="",
        metadata=needed("folder, .gguf file, `package:NAME[/FOLDER]`, or a name on the model hub"),
    )
    output: str = field(
        default="", metadata=needed("folder to write; an earlier run there is replaced")
    )
    method: Literal["lora", "qlora", "dora", "freeze", "full", "bitfit"] = field(
        default="lora", metadata=about("what of the model trains")
    )
    seed: int = field(
        default=0, metadata=about("of the split, the head, the adapter and the data order", low=0)
    )
    threads: int | None = field(
        default=None, metadata=about("CPU threads; torch's own choice when absent", low=1)
    )
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata=about("auto takes a GPU where there is one; cuda insists on it")
    )
    precision: Literal["auto", "fp32", "bf16", "bf16-weights"] = field(
        default="auto",
        metadata=about(
            "bf16: autocast, what trains stays fp32; bf16-weights: everything is bf16; auto: bf16 "
            "where the hardware multiplies it"
        ),
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "lora_kernels"] = field(
        default="auto", metadata=about("transformers' attention implementation")
    )
    kernels: bool = field(default=True, metadata=about("fuse the adapters with lora_kernels.apply"))
    compare_stock: bool = field(
        default=False, metadata=about("train once more with stock PEFT, for the report")
    )
    metric: str | None = field(
        default=None,
        metadata=about(
            "the metric that the report quotes and that picks the best checkpoint; the task's own "
            "when absent"
        ),
    )
    trackers: list[str] = field(
        default_factory=list,
        metadata=about(
            "also log to these: tensorboard, wandb, trackio, jsonl; log.jsonl is always written"
        ),
    )
    resume: str | None = field(
        default=None,
        metadata=about(
            "a checkpoint, a folder of checkpoints, or auto: the last finished one of this output, "
            "if there is one"
        ),
    )
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def to_dict(self) -> dict[str, Any]:
        """As nested dictionaries, in the order of the fields."""
        return asdict(self)
