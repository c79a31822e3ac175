"""Sequences of different lengths in rows of one size, so that little or no padding is computed."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_kernels.training.metrics.language import IGNORED


@dataclass(frozen=True)
class Piece:
    """A document or a part of one: tokens, and a label per token (-100: not learnt)."""

    ids: list[int]
    labels: list[int]


def cut(piece: Piece, size: int) -> list[Piece]:
    """Parts of at most `size` tokens; a last part of one token, which predicts nothing, is left
    out."""
    parts = [
        Piece(piece.ids[start : start + size], piece.labels[start : start + size])
        for start in range(0, len(piece.ids), size)
    ]
    return [part for part in parts if len(part.ids) > 1]


def fill(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices per row: best-fit decreasing, so no row holds more than `size`.

    The result depends on the lengths alone.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            left, row = size, len(rows)
            rows.append([])
        else:
            left, row = room.pop(at)
        rows[row].append(index)
        if left > length:
            bisect.insort(room, (left - length, row))
    return rows


def pack_documents(pieces: Sequence[Piece], size: int) -> list[dict[str, Any]]:
    """Rows of whole pieces. Positions begin anew with each, and the first token of a piece has no
    label, as the token before it belongs to another one."""
    rows = []
    for indices in fill([len(piece.ids) for piece in pieces], size):
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for piece in (pieces[i] for i in sorted(indices)):
            row["input_ids"] += piece.ids
            row["labels"] += [IGNORED, *piece.labels[1:]]
            row["position_ids"] += range(len(piece.ids))
        rows.append(row)
    return rows


def cut_stream(pieces: Iterable[Piece], size: int) -> list[dict[str, Any]]:
    """Rows of one long text; documents see the ones before them in their row."""
    ids: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        ids += piece.ids
        labels += piece.labels
    return [_row(part) for part in cut(Piece(ids, labels), size)]


def one_per_row(pieces: Iterable[Piece]) -> list[dict[str, Any]]:
    """A row per piece, to be padded."""
    return [_row(piece) for piece in pieces]


def _row(piece: Piece) -> dict[str, Any]:
    return {
        "input_ids": piece.ids,
        "attention_mask": [1] * len(piece.ids),
        "labels": piece.labels,
    }
