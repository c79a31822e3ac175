"""Entities in sequences of tags: which words they span, and how many were found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

Span = tuple[str, int, int]  # kind, first word, last word + 1


def entities(tags: Sequence[str]) -> list[Span]:
    """Spans of IOB1, IOB2 or IOBES tags; tags without a prefix are runs of equal ones.

    Rules of the CoNLL evaluation: a span begins at B or S, or at an I or E whose kind differs from
    the open span's; it ends before O, B and S, and after E and S.
    """
    prefixed = any(tag[:2] in ("B-", "I-") for tag in tags)
    spans: list[Span] = []
    kind, start = "", 0
    for position, tag in enumerate([*tags, "O"]):
        prefix, name = _parts(tag, prefixed)
        if kind and (prefix in "OBS" or name != kind):
            spans.append((kind, start, position))
            kind = ""
        if prefix != "O" and not kind:
            kind, start = name, position
        if kind and prefix in "ES":
            spans.append((kind, start, position + 1))
            kind = ""
    return spans


def _parts(tag: str, prefixed: bool) -> tuple[str, str]:
    if tag in ("O", ""):
        return "O", ""
    if prefixed and tag[1:2] == "-" and tag[0] in "BIES":
        return tag[0], tag[2:]
    return "I", tag


def entity_scores(
    predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]
) -> dict[str, float]:
    """``precision``, ``recall`` and ``f1`` of whole entities over all sentences, and ``f1_macro``
    over the kinds; ``accuracy`` of single tags."""
    hits: Counter[str] = Counter()
    found: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    right = words = 0
    for guess, truth in zip(predicted, true, strict=True):
        a, b = set(entities(guess)), set(entities(truth))
        hits.update(kind for kind, *_ in a & b)
        found.update(kind for kind, *_ in a)
        wanted.update(kind for kind, *_ in b)
        right += sum(g == t for g, t in zip(guess, truth, strict=True))
        words += len(truth)
    kinds = sorted(set(found) | set(wanted))
    each = [_f1(hits[k], found[k], wanted[k]) for k in kinds]
    total = hits.total(), found.total(), wanted.total()
    return {
        "precision": total[0] / total[1] if total[1] else 0.0,
        "recall": total[0] / total[2] if total[2] else 0.0,
        "f1": _f1(*total),
        "f1_macro": sum(each) / len(each) if each else 0.0,
        "accuracy": right / words if words else 0.0,
    }


def _f1(hits: int, found: int, wanted: int) -> float:
    return 2.0 * hits / (found + wanted) if found + wanted else 0.0
