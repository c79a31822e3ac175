"""Tokenizer and base model of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers

from lora_kernels.errors import ConfigError, LoraKernelsError
from lora_kernels.integrations.transformers.attention import register_attention
from lora_kernels.training.config import Config
from lora_kernels.training.quantized_base import check_training, reading_options
from lora_kernels.training.tasks import Task

# Their position embeddings begin after the padding token's number.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "longformer", "mpnet",
                     "roberta-prelayernorm", "data2vec-text", "ibert", "luke")  # fmt: skip
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


@dataclass
class Base:
    """A base model.

    Attributes:
        fresh: parameters that no file gave: those of a new head, say.
        layers: what a method that makes its own layers says of each; as `report.to_dict()`.
    """

    model: Any
    fresh: list[str] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)


def load_tokenizer(path: str) -> Any:
    """The model's tokenizer, with a padding token.

    Raises:
        ConfigError: `path` holds none.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise ConfigError(f"model={path!r}: no tokenizer can be loaded: {first_line(e)}") from None
    # Where a folder has no tokenizer files, some classes make one without a vocabulary.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ConfigError(f"model={path!r}: no tokenizer can be loaded: its files are missing")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"model={path!r}: the tokenizer has no padding and no end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(task: Task, path: str, dtype: Any, tokenizer: Any, options: dict[str, Any]) -> Base:
    """The base model with the head of the task.

    Args:
        dtype: of the weights.
        options: further keywords of ``from_pretrained``.

    Raises:
        ConfigError: `path` is no model that has such a head, or takes only shorter inputs.
    """
    check_length(task, path)
    options = {**reading_options(_stored_config(path)), **options}
    load = getattr(transformers, task.auto_class).from_pretrained
    try:
        model, info = load(
            path, dtype=dtype, output_loading_info=True, **task.head_options(), **options
        )
    except LoraKernelsError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
        raise ConfigError(f"model={path!r} cannot be loaded: {first_line(e)}") from None
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    mismatched = [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
    return Base(model, sorted({*info["missing_keys"], *mismatched}))


def load_options(config: Config, path: str) -> dict[str, Any]:
    """What the configuration says about the base model, as keywords of ``from_pretrained``.

    Raises:
        ConfigError: `path` is no model, or one that is quantized in a way that the configuration
            does not go with.
    """
    check_training(config, _stored_config(path))
    options: dict[str, Any] = {}
    if config.attention == "lora_kernels":
        register_attention()
    if config.attention != "auto":
        options["attn_implementation"] = config.attention
    rate = config.train.base_dropout
    if rate is not None:
        # Families of models call it hidden_dropout_prob, attention_dropout, resid_pdrop, ...
        stored = _stored_config(path).to_dict()
        options |= {k: rate for k, v in stored.items() if "drop" in k and type(v) in (int, float)}
    return options


def longest_input(config: Any) -> int | None:
    """Tokens that a model takes at most; None where positions are relative or unlimited."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in _LENGTH_KEYS:
        value = getattr(text, key, None)
        if isinstance(value, int) and value > 0:
            if text.model_type in _OFFSET_POSITIONS:
                value -= (getattr(text, "pad_token_id", None) or 0) + 1
            return value
    return None


def check_length(task: Task, path: str) -> None:
    """Refuses a ``data.max_length`` beyond the model's positions, before its weights are read.

    Raises:
        ConfigError: too long, or `path` is no model.
    """
    longest = longest_input(_stored_config(path))
    if longest is not None and task.max_length > longest:
        raise ConfigError(
            f"data.max_length={task.max_length} is out of range; accepted: 2 to {longest} "
            "for this model"
        )


def _stored_config(path: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"model={path!r} cannot be loaded: {first_line(e)}") from None


def first_line(error: BaseException) -> str:
    """Other libraries' messages run over many lines; ours is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
