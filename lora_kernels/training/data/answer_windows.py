"""Windows over long texts for extractive answers: from characters to tokens and back."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

_CANDIDATES = 20
_LONGEST_ANSWER = 30  # tokens


@dataclass(frozen=True)
class Answer:
    """A text and the place of its first character; -1 where that is not known."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """No answers say that the context has none."""

    question: str
    context: str
    answers: tuple[Answer, ...]

    @property
    def accepted(self) -> list[str]:
        return [answer.text for answer in self.answers]


@dataclass(frozen=True)
class Found:
    """The best span of a context. `text` is empty where no answer is the likelier."""

    text: str
    start: int
    score: float


def windows(
    questions: list[Question], tokenizer: Any, max_length: int, stride: int
) -> list[dict[str, Any]]:
    """Rows of at most `max_length` tokens: the whole question, and a part of its context.

    Beside the model's inputs and the positions of the first answer (of the first token where the
    window does not hold it), each row has ``number`` and ``question``, and ``offsets``: the
    characters of each token of the context, None for all other tokens.
    """
    encoded = tokenizer(
        [q.question for q in questions],
        [q.context for q in questions],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    rows = []
    for i, number in enumerate(encoded["overflow_to_sample_mapping"]):
        parts = encoded.sequence_ids(i)
        offsets = [
            tuple(pair) if part == 1 else None
            for pair, part in zip(encoded["offset_mapping"][i], parts, strict=True)
        ]
        question = questions[number]
        start, end = _tokens_of(question, offsets)
        row = {
            "input_ids": encoded["input_ids"][i],
            "attention_mask": encoded["attention_mask"][i],
            "start_positions": start,
            "end_positions": end,
            "number": number,
            "question": question,
            "offsets": offsets,
        }
        if "token_type_ids" in encoded:
            row["token_type_ids"] = encoded["token_type_ids"][i]
        rows.append(row)
    return rows


def _tokens_of(question: Question, offsets: list[tuple[int, int] | None]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) where this window lacks a part of it."""
    if not question.answers:
        return 0, 0
    begin = question.answers[0].start
    end = begin + len(question.answers[0].text)
    inside = [
        i
        for i, pair in enumerate(offsets)
        if pair is not None and pair[0] < end and pair[1] > begin
    ]
    if not inside:
        return 0, 0
    first, last = offsets[inside[0]], offsets[inside[-1]]
    assert first is not None and last is not None
    return (inside[0], inside[-1]) if first[0] <= begin and last[1] >= end else (0, 0)


def best_answers(
    rows: list[dict[str, Any]], starts: Any, ends: Any, may_be_empty: bool
) -> dict[int, Found]:
    """The likeliest span of each question over all its windows.

    Args:
        rows: as :func:`windows` made them.
        starts, ends: a row of logits per window, as long as the window or padded at the end.
        may_be_empty: the training had questions without an answer; otherwise the model never learnt
            when to give none, and the best span is given always.

    A span begins no later than it ends, lies in the context and has at most 30 tokens. Its score is
    the sum of its two logits less those of the first token, which stands for no answer; the least
    score of "no answer" over the windows counts, as every window but one may well lack it.
    """
    best: dict[int, tuple[float, int, int]] = {}
    none: dict[int, float] = {}
    for row, start, end in zip(rows, starts, ends, strict=True):
        number, offsets = row["number"], row["offsets"]
        null = float(start[0] + end[0])
        none[number] = min(none.get(number, null), null)
        inside = [i for i, pair in enumerate(offsets) if pair is not None and pair[1] > pair[0]]
        first = heapq.nlargest(_CANDIDATES, inside, key=start.__getitem__)
        last = heapq.nlargest(_CANDIDATES, inside, key=end.__getitem__)
        for i in first:
            for j in last:
                if i <= j < i + _LONGEST_ANSWER:
                    score = float(start[i] + end[j])
                    if number not in best or score > best[number][0]:
                        best[number] = (score, offsets[i][0], offsets[j][1])
    found = {}
    for number, question in {row["number"]: row["question"] for row in rows}.items():
        score, begin, stop = best.get(number, (none[number], 0, 0))
        score -= none[number]
        empty = stop == 0 or (may_be_empty and score < 0.0)
        text = "" if empty else question.context[begin:stop]
        found[number] = Found(text, -1 if empty else begin, score)
    return found
