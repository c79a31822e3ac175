"""Scores of class probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def class_scores(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Accuracy, micro and macro F1, and the area under the ROC curve where it is defined.

    Args:
        logits: ``[N, C]``, floating point.
        target: ``[N]``, integers below C.

    Returns:
        ``accuracy``, ``f1`` and ``f1_macro`` (the same: the mean over the classes), ``f1_micro``,
        and ``auc_roc``: of the second class of two, else one class against the rest, averaged over
        the classes that occur. The area is absent where fewer than two classes occur.
    """
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

    classes = logits.shape[1]
    macro = float(multiclass_f1_score(logits, target, classes, average="macro"))
    scores = {
        "accuracy": float(multiclass_accuracy(logits, target, classes, average="micro")),
        "f1": macro,
        "f1_macro": macro,
        "f1_micro": float(multiclass_f1_score(logits, target, classes, average="micro")),
    }
    area = roc_area(logits.softmax(-1), target)
    return scores if area is None else {**scores, "auc_roc": area}


def roc_area(probabilities: Tensor, target: Tensor) -> float | None:
    """Area under the ROC curve, or None where one class is all there is.

    Args:
        probabilities: ``[N, C]``.
        target: ``[N]``.
    """
    from torchmetrics.functional.classification import binary_auroc

    classes = probabilities.shape[1]
    wanted = [1] if classes == 2 else range(classes)
    areas = [
        float(binary_auroc(probabilities[:, c], (target == c).long()))
        for c in wanted
        if 0 < int((target == c).sum()) < len(target)
    ]
    return sum(areas) / len(areas) if areas else None


def confusion(logits: Tensor, target: Tensor) -> list[list[int]]:
    """Counts, a row per true class and a column per predicted one."""
    classes = logits.shape[1]
    cells = target * classes + logits.argmax(-1)
    counts: Any = torch.bincount(cells, minlength=classes * classes).reshape(classes, classes)
    rows: list[list[int]] = counts.tolist()
    return rows
