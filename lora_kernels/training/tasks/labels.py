"""Class names as data files give them."""

from __future__ import annotations

from lora_kernels.errors import DataError

_NOT_A_NUMBER = ("nan", "-nan", "+nan")


def check_label(label: str, source: str, number: int) -> str:
    """The label itself.

    Raises:
        DataError: it says "not a number".
    """
    if label.lower() in _NOT_A_NUMBER:
        raise DataError(
            f"{source}, row {number}: the label is {label}; accepted: the name of a class; give "
            "the row a label, remove it, or rename the class"
        )
    return label


def label_order(label: str) -> tuple[int, float, str]:
    """Sorts numbers as numbers, before the rest."""
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)
