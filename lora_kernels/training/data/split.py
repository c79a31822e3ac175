"""Stratified splits that depend on the seed and the data alone."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

Split = tuple[list[int], list[int], list[int]]


def stratified_split(
    labels: Sequence[str], validation: float, test: float, seed: int, limit: int | None = None
) -> Split:
    """(train, validation, test) indices, each with the classes in the proportions of the whole.

    A fraction above zero takes at least one example of each class that has an example to spare;
    the first example of a class always goes to train. `limit` first thins the classes evenly.
    """
    by_class: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        by_class[label].append(index)
    keep = 1.0 if limit is None else min(1.0, limit / len(labels))
    train: list[int] = []
    held_out: tuple[list[int], list[int]] = ([], [])
    for label in sorted(by_class):
        indices = by_class[label]
        # One generator per class: adding a class does not reshuffle the others.
        random.Random(f"{seed}:{label}").shuffle(indices)
        indices = indices[: max(1, round(keep * len(indices)))]
        spare = len(indices) - 1
        start = 0
        for part, fraction in zip(held_out, (validation, test), strict=True):
            count = 0 if fraction == 0.0 else max(1, round(fraction * len(indices)))
            count = min(count, spare)
            part += indices[start : start + count]
            start, spare = start + count, spare - count
        train += indices[start:]
    return sorted(train), sorted(held_out[0]), sorted(held_out[1])


def grouped_split(
    groups: Sequence[str], validation: float, test: float, seed: int, limit: int | None = None
) -> Split:
    """As :func:`stratified_split` without classes; examples of one group stay in one part.

    `limit` thins the examples first, keeping whole groups where it can.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    names = list(members)
    if limit is not None and limit < len(groups):
        random.Random(f"{seed}:limit").shuffle(names)
        kept, names = names, []
        while kept and sum(len(members[n]) for n in names) < limit:
            names.append(kept.pop())
    train, *held_out = stratified_split([""] * len(names), validation, test, seed)
    parts = [sorted(i for n in part for i in members[names[n]]) for part in (train, *held_out)]
    return parts[0], parts[1], parts[2]
