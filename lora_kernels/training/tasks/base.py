"""What the runner needs to know of a task, and what all tasks do alike."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lora_kernels.errors import AdapterFileError, ConfigError, DataError
from lora_kernels.training.config import Config

Features = list[dict[str, Any]]


@dataclass
class Task(abc.ABC):
    """The examples of a run and how a model is fed, scored and asked.

    Attributes:
        name: as in the configuration.
        usual_metric: what the report quotes unless the configuration says otherwise.
        metrics: every name that :meth:`compute_metrics` may give, with whether more is better.
        peft_task: PEFT's name of the task; None where PEFT has none.
        auto_class: transformers' class that loads the model with its head.
        generates: the evaluation writes answers instead of looking at logits.
        language_model: rows are long and logits large; evaluation batches are small.
        label_names: inputs that hold the truth, where the model's own names are not meant.
        max_length: tokens per example.
        too_long: ``cut`` or ``refuse``.
        metric: the name of the metric that counts.
        splits: examples of ``train``, ``validation`` and ``test``.
        notes: lines for the user about data and model.
        details: what the last evaluation gave besides numbers; goes into the report.
    """

    name: ClassVar[str]
    usual_metric: ClassVar[str]
    metrics: ClassVar[dict[str, bool]]
    peft_task: ClassVar[str | None] = None
    auto_class: ClassVar[str]
    generates: ClassVar[bool] = False
    language_model: ClassVar[bool] = False
    label_names: ClassVar[list[str] | None] = None

    max_length: int = 128
    too_long: str = "cut"
    metric: str = ""
    splits: dict[str, list[Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.metric = self.metric or self.usual_metric

    @property
    def sizes(self) -> dict[str, int]:
        """Examples per split."""
        return {name: len(examples) for name, examples in self.splits.items()}

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: Config) -> Task:
        """Reads and splits the data; raises DataError."""

    @classmethod
    @abc.abstractmethod
    def from_saved(cls, saved: dict[str, Any]) -> Task:
        """From what :meth:`to_saved` gave, without data: for prediction."""

    @abc.abstractmethod
    def to_saved(self) -> dict[str, Any]:
        """What prediction needs besides the adapter; JSON."""

    def head_options(self) -> dict[str, Any]:
        """Keywords of ``from_pretrained`` that shape the head."""
        return {}

    def prepare(self, model: Any, tokenizer: Any) -> None:
        """Looks at the loaded base model before data become tokens; may add notes."""
        self.details["prepared"] = type(model).__name__

    @abc.abstractmethod
    def dataset(self, split: str, tokenizer: Any) -> Features:
        """Tokenized examples of ``train``, ``validation`` or ``test``."""

    @abc.abstractmethod
    def collator(self, tokenizer: Any, model: Any = None) -> Callable[[Features], dict[str, Any]]:
        """Examples to a batch of tensors."""

    def reduce_logits(self) -> Callable[[Any, Any], Any] | None:
        """For the Trainer's ``preprocess_logits_for_metrics``."""
        return None

    @abc.abstractmethod
    def compute_metrics(
        self, prediction: Any, features: Features | None = None
    ) -> dict[str, float]:
        """From the Trainer's EvalPrediction over `features`; fills :attr:`details`."""

    @abc.abstractmethod
    def predict(self, model: Any, tokenizer: Any, inputs: list[Any]) -> list[dict[str, Any]]:
        """One answer per input."""

    def read_input(self, text: str, context: str | None = None) -> Any:
        """An input of :meth:`predict` from the command line.

        Raises:
            DataError: `context` is given and the task has no use for one.
        """
        if context is not None:
            raise DataError(f"--context is for question-answering; this run is {self.name}")
        return text

    @abc.abstractmethod
    def show(self, answer: dict[str, Any]) -> str:
        """An answer as a line."""

    def use_metric(self, name: str | None) -> None:
        """Takes the metric of the configuration.

        Raises:
            ConfigError: this task does not compute it.
        """
        if name is None:
            return
        if name not in (*self.metrics, "loss"):
            raise ConfigError(
                f"metric={name!r} is none of task={self.name}; accepted: "
                f"{', '.join(self.metrics)}, loss"
            )
        self.metric = name

    @property
    def more_is_better(self) -> bool:
        """Whether a larger value of :attr:`metric` is better."""
        return self.metrics.get(self.metric, False)

    def count_long(self, split: str, lengths: Sequence[int], limit: int, what: str) -> None:
        """Refuses or notes examples of more than `limit` tokens.

        Raises:
            DataError: there are some, and ``data.too_long=refuse``.
        """
        long = sum(n > limit for n in lengths)
        if not long:
            return
        if self.too_long == "refuse":
            raise DataError(
                f"{split}: {long} of {len(lengths)} {what} have more than {limit} tokens (the "
                f"longest {max(lengths)}) and data.too_long=refuse; raise data.max_length, shorten "
                "them, or give data.too_long=cut"
            )
        self.notes.append(f"{split}: {long} of {len(lengths)} {what} cut to {limit} tokens")


def saved_length(saved: dict[str, Any]) -> int:
    """``max_length`` of a saved run.

    Raises:
        AdapterFileError: it is missing or no length.
    """
    value = saved.get("max_length")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterFileError("the saved run lacks its max_length")
    return value


def saved_names(saved: dict[str, Any], key: str, least: int) -> list[str]:
    """A list of texts of a saved run.

    Raises:
        AdapterFileError: it is missing or something else.
    """
    value = saved.get(key)
    if (
        not isinstance(value, list)
        or len(value) < least
        or not all(isinstance(name, str) for name in value)
    ):
        raise AdapterFileError(f"the saved run lacks its {key}: label names are needed")
    return value


def batches(items: list[Any], size: int = 32) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
