"""What a model can be taught: one file each, a class shaped like `Task`, named in `_TASKS`."""

from __future__ import annotations

import importlib

from lora_kernels.errors import ConfigError
from lora_kernels.training.tasks.base import Task

_TASKS = {
    "classification": ("classification", "Classification"),
    "causal-lm": ("causal_lm", "CausalLM"),
    "masked-lm": ("masked_lm", "MaskedLM"),
    "seq2seq": ("seq2seq", "Seq2Seq"),
    "question-answering": ("question_answering", "QuestionAnswering"),
    "token-classification": ("token_classification", "TokenClassification"),
}

__all__ = ["Task", "task_class"]


def task_class(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        ConfigError: no such task.
    """
    if name not in _TASKS:
        raise ConfigError(f"task={name!r} is not known; accepted: {', '.join(_TASKS)}")
    stem, class_name = _TASKS[name]
    module = importlib.import_module(f"lora_kernels.training.tasks.{stem}")
    found: type[Task] = getattr(module, class_name)
    return found
