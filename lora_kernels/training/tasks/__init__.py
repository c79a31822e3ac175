"""What a model can be taught: one file each, a class shaped like `Task`, named in `_TASKS`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

from lora_kernels.errors import ConfigError
from lora_kernels.training.config import Config

_TASKS = {"classification": "Classification"}


class Task(Protocol):
    """What the runner needs to know of a task.

    Attributes:
        name: as in the configuration.
        metric: the key of `compute_metrics` that the report quotes.
        peft_task: PEFT's name of the task.
        notes: lines for the user about the data.
        sizes: examples per split.
    """

    name: str
    metric: str
    peft_task: str
    notes: list[str]
    sizes: dict[str, int]

    @classmethod
    def from_config(cls, config: Config) -> Task:
        """Reads and splits the data; raises DataError."""
        ...

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> Task:
        """From what :meth:`to_saved` gave, without data: for prediction."""
        ...

    def to_saved(self) -> dict[str, Any]:
        """What prediction needs besides the adapter; JSON."""
        ...

    def load_model(self, path: str, dtype: Any, options: dict[str, Any]) -> Any:
        """The base model with this task's head; `options` are keywords of ``from_pretrained``."""
        ...

    def dataset(self, split: str, tokenizer: Any) -> list[dict[str, Any]]:
        """Tokenized examples of ``train``, ``validation`` or ``test``."""
        ...

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Examples to a batch of tensors."""
        ...

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """From the Trainer's EvalPrediction."""
        ...

    def predict(self, model: Any, tokenizer: Any, texts: list[str]) -> list[dict[str, Any]]:
        """One answer per text."""
        ...


def task_class(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        ConfigError: no such task.
    """
    if name not in _TASKS:
        raise ConfigError(f"task={name!r} is not known; accepted: {', '.join(_TASKS)}")
    module = importlib.import_module(f"lora_kernels.training.tasks.{name}")
    found: type[Task] = getattr(module, _TASKS[name])
    return found
