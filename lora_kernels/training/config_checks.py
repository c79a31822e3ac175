"""What the values of a configuration must be together."""

from __future__ import annotations

from typing import Any

from lora_kernels.errors import ConfigError
from lora_kernels.training.config import Config

# Keys that only some tasks read. Set for another task they would be ignored, so they are refused.
_ONLY = {
    "data.text": ("classification", "causal-lm", "masked-lm", "token-classification"),
    "data.label": ("classification",),
    "data.source": ("seq2seq",),
    "data.target": ("seq2seq",),
    "data.prompt": ("causal-lm",),
    "data.response": ("causal-lm",),
    "data.messages": ("causal-lm",),
    "data.question": ("question-answering",),
    "data.context": ("question-answering",),
    "data.answers": ("question-answering",),
    "data.tokens": ("token-classification",),
    "data.tags": ("token-classification",),
    "data.max_target_length": ("seq2seq",),
    "data.documents": ("causal-lm", "masked-lm"),
    "data.packing": ("causal-lm",),
    "data.stride": ("question-answering",),
    "data.mask_probability": ("masked-lm",),
    "data.label_all_pieces": ("token-classification",),
    "data.prefix": ("seq2seq",),
    "data.source_language": ("seq2seq",),
    "data.target_language": ("seq2seq",),
    "generation.beams": ("seq2seq",),
    "generation.length_penalty": ("seq2seq",),
    "train.label_smoothing": (
        "classification", "causal-lm", "masked-lm", "seq2seq", "token-classification",
    ),
}  # fmt: skip
TRACKERS = ("tensorboard", "wandb", "trackio", "jsonl")
ADAPTER_METHODS = ("lora", "qlora", "dora")
PEFT_METHODS = ("lora", "dora")


def check_together(config: Config) -> None:
    """Combinations that cannot be honoured.

    Raises:
        ConfigError: naming both keys.
    """
    _check_task_keys(config)
    _check_split(config)
    _check_training(config)
    _check_method(config)
    for name in config.trackers:
        if name not in TRACKERS:
            raise ConfigError(f"trackers={name!r} is not known; accepted: {', '.join(TRACKERS)}")


def _check_task_keys(config: Config) -> None:
    usual = Config()
    for key, tasks in _ONLY.items():
        if config.task not in tasks and _value(config, key) != _value(usual, key):
            raise ConfigError(
                f"{key}={_value(config, key)!r} means nothing to task={config.task}; it belongs to "
                f"{', '.join(tasks)}"
            )


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _check_split(config: Config) -> None:
    data = config.data
    share = (0.0 if data.validation else data.validation_fraction) + (
        0.0 if data.test else data.test_fraction
    )
    if share >= 1.0:
        raise ConfigError(
            f"data.validation_fraction + data.test_fraction = {share:g} leaves nothing to train "
            "on; accepted: a sum below 1"
        )
    if config.task == "question-answering" and data.stride >= data.max_length // 2:
        raise ConfigError(
            f"data.stride={data.stride} is too much for data.max_length={data.max_length}; "
            "accepted: less than half of it"
        )


def _check_training(config: Config) -> None:
    train = config.train
    if train.max_steps == 0 or (train.max_steps < 0 and train.epochs == 0):
        raise ConfigError(
            "train.epochs=0 and train.max_steps <= 0 train nothing; give one of them a value"
        )
    keeps_best = train.keep_best or train.early_stopping is not None
    if keeps_best and not config.data.validation and config.data.validation_fraction == 0.0:
        raise ConfigError(
            "train.keep_best and train.early_stopping need validation data; give data.validation "
            "or data.validation_fraction"
        )
    if (
        train.eval_steps is not None
        and not config.data.validation
        and config.data.validation_fraction == 0.0
    ):
        raise ConfigError(
            f"train.eval_steps={train.eval_steps} needs validation data; give data.validation or "
            "data.validation_fraction"
        )
    if config.compare_stock and train.early_stopping is not None:
        raise ConfigError(
            "compare_stock=True and train.early_stopping exclude each other: both runs have to "
            "take the same steps"
        )
    if train.save_total_limit is not None and train.save_steps is None and not keeps_best:
        raise ConfigError(
            f"train.save_total_limit={train.save_total_limit} needs checkpoints; give "
            "train.save_steps, train.keep_best or train.early_stopping"
        )
    if (
        keeps_best
        and train.save_steps
        and (not train.eval_steps or train.save_steps % train.eval_steps)
    ):
        raise ConfigError(
            f"train.save_steps={train.save_steps} does not fit train.eval_steps={train.eval_steps}:"
            " to keep the best checkpoint each has to be validated; accepted: a multiple of "
            "train.eval_steps, or no train.save_steps"
        )
    if config.resume and config.compare_stock:
        raise ConfigError("resume and compare_stock=True exclude each other: a comparison is whole")


def _check_method(config: Config) -> None:
    adapters = config.method in ADAPTER_METHODS
    if config.compare_stock and not config.kernels:
        raise ConfigError("compare_stock=True needs kernels=True, or both runs would be stock PEFT")
    if config.method == "qlora" and not config.kernels:
        raise ConfigError("method=qlora runs on layers of lora_kernels; kernels=False excludes it")
    if config.compare_stock and config.method not in PEFT_METHODS:
        raise ConfigError(
            f"compare_stock=True compares adapters; method={config.method} has no stock twin; "
            "accepted: lora, dora"
        )
    if config.train.loraplus_ratio is not None and not adapters:
        raise ConfigError(
            f"train.loraplus_ratio={config.train.loraplus_ratio:g} needs an adapter; "
            f"method={config.method} has none; accepted: {', '.join(ADAPTER_METHODS)}"
        )
    if config.method == "freeze" and not config.freeze.layers and not config.freeze.modules:
        raise ConfigError("freeze.layers=0 and no freeze.modules train nothing; give one of them")
