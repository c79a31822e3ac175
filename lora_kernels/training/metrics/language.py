"""Perplexity, weighted by tokens: a mean over batches weighs short ones like long ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


def causal_sums(logits: Any, labels: Tensor) -> Tensor:
    """Per row the summed negative log-likelihood, the count and the hits of the next tokens.

    Args:
        logits: ``[B, T, V]``, or a tuple that begins with them.
        labels: ``[B, T]``; position t is predicted from the logits at t - 1; -100 is not counted.

    Returns:
        ``[B, 3]``, fp64. Small, so an evaluation never keeps the logits of more than one batch.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    return masked_sums(logits[:, :-1], labels[:, 1:])


def masked_sums(logits: Any, labels: Tensor) -> Tensor:
    """As :func:`causal_sums`, position t predicted from the logits at t."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    rows = []
    for row, label in zip(logits, labels, strict=True):
        kept = label != IGNORED
        row, label = row[kept].float(), label[kept]
        loss = torch.nn.functional.cross_entropy(row, label, reduction="sum")
        hits = (row.argmax(-1) == label).sum()
        rows.append(torch.stack([loss.double(), kept.sum().double(), hits.double()]))
    return torch.stack(rows)


def language_scores(sums: Any) -> dict[str, float]:
    """``perplexity``, ``token_accuracy`` and the ``tokens`` counted, of the rows of an evaluation.

    Args:
        sums: ``[N, 3]`` as :func:`causal_sums` gives them.
    """
    loss, count, hits = torch.as_tensor(sums, dtype=torch.float64).sum(0).tolist()
    mean = loss / count if count else math.nan
    return {
        "perplexity": math.exp(mean) if mean < 700.0 else math.inf,
        "token_accuracy": hits / count if count else math.nan,
        "tokens": count,
    }
