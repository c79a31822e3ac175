"""Which layers of a model an adapter is for, by PEFT's rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from lora_kernels.errors import InvalidArgumentError

ALL_LINEAR = "all-linear"
# Attribute names of the heads of sequence classifiers.
_CLASSIFIERS = ("score", "classifier")
Matcher = Callable[[str], bool]


def matcher(patterns: str | Sequence[str], argument: str) -> Matcher:
    """Text is a regular expression for the whole name; a list holds names or their endings.

    Raises:
        InvalidArgumentError: neither of the two, or not a valid expression.
    """
    if isinstance(patterns, str):
        try:
            expression = re.compile(patterns)
        except re.error as error:
            raise InvalidArgumentError(
                f"{argument}={patterns!r} is not a regular expression: {error}"
            ) from None
        return lambda name: expression.fullmatch(name) is not None
    names = check_names(patterns, argument)
    return lambda name: any(name == n or name.endswith(f".{n}") for n in names)


def check_names(names: object, argument: str) -> tuple[str, ...]:
    """`names` as a tuple, when it is a list, tuple or set of text."""
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(
        isinstance(name, str) and name for name in names
    ):
        raise InvalidArgumentError(f"{argument}={names!r}; accepted: a list of module names")
    return tuple(sorted(names) if isinstance(names, (set, frozenset)) else names)


def is_all_linear(targets: object) -> bool:
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def output_head(model: nn.Module) -> tuple[nn.Module, str] | None:
    """The module that all-linear leaves alone and what it is; only models of transformers' kind.

    Such a model answers get_output_embeddings(); without output embeddings it may still have a
    classification head.
    """
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if not callable(get_output_embeddings):
        return None
    try:
        head = get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    if isinstance(head, nn.Module):
        return head, "output embeddings"
    for name in _CLASSIFIERS:
        classifier = getattr(model, name, None)
        if isinstance(classifier, nn.Module):
            return classifier, "classification head"
    return None
