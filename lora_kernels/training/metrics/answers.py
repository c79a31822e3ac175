"""Exact match and word overlap of extracted answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def answer_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """``exact_match`` and ``f1``, 0..1, as SQuAD defines them and torchmetrics counts them.

    Args:
        answers: one text each; empty says that there is no answer.
        references: the accepted answers of each question; none says that there is no answer.
    """
    from torchmetrics.functional.text import squad

    predictions: list[Any] = []
    targets: list[Any] = []
    exact = overlap = 0.0
    for number, (answer, accepted) in enumerate(zip(answers, references, strict=True)):
        if not accepted or not answer:
            # Both empty is right; the word overlap of an empty text is not defined otherwise.
            right = float(not accepted and not answer)
            exact, overlap = exact + right, overlap + right
            continue
        predictions.append({"prediction_text": answer, "id": str(number)})
        texts = list(accepted)
        targets.append(
            {"answers": {"answer_start": [0] * len(texts), "text": texts}, "id": str(number)}
        )
    if targets:
        found = squad(predictions, targets)
        # A count, which the percentage in fp32 has rounded.
        exact += round(float(found["exact_match"]) / 100.0 * len(targets))
        overlap += float(found["f1"]) / 100.0 * len(targets)
    count = max(1, len(answers))
    return {"exact_match": exact / count, "f1": overlap / count}
