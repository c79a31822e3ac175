"""Long contexts in windows: every answer is found in the right tokens and read back as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_models import write_bert

from lora_kernels.training.data.answer_windows import Answer, Question, best_answers, windows

transformers = pytest.importorskip("transformers")

LONG = "the old town again and " * 6 + "anna visits rome today . bert leaves oslo ."


def asked(context: str, answer: str) -> Question:
    places = (Answer(answer, context.index(answer)),) if answer else ()
    return Question("where is anna ?", context, places)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return transformers.AutoTokenizer.from_pretrained(write_bert(tmp_path_factory.mktemp("bert")))


def text_of_labels(row: dict[str, Any]) -> str:
    start, end = row["start_positions"], row["end_positions"]
    if (start, end) == (0, 0):
        return ""
    return row["question"].context[row["offsets"][start][0] : row["offsets"][end][1]]


@pytest.mark.parametrize("answer", ["rome", "anna visits rome", "the", "oslo", "."])
def test_labels_span_the_answer_or_nothing(tokenizer: Any, answer: str) -> None:
    rows = windows([asked(LONG, answer)], tokenizer, 20, 6)
    assert len(rows) > 2
    found = [text_of_labels(row) for row in rows]
    assert set(found) <= {answer, ""} and answer in found


def test_every_token_of_the_context_is_in_some_window(tokenizer: Any) -> None:
    rows = windows([asked(LONG, "rome")], tokenizer, 20, 6)
    seen = {pair for row in rows for pair in row["offsets"] if pair is not None}
    whole = tokenizer(LONG, add_special_tokens=False, return_offsets_mapping=True)
    assert seen == {tuple(pair) for pair in whole["offset_mapping"]}
    assert max(len(row["input_ids"]) for row in rows) <= 20
    # Neighbours share as many tokens as the stride says.
    first, second = ([pair for pair in row["offsets"] if pair is not None] for row in rows[:2])
    assert first[-6:] == second[:6]


def test_an_answer_cut_by_a_window_is_not_half_learnt(tokenizer: Any) -> None:
    answer = "anna visits rome today ."
    begin, end = LONG.index(answer), LONG.index(answer) + len(answer)
    kinds = set()
    for stride in range(9):
        for row in windows([asked(LONG, answer)], tokenizer, 20, stride):
            inside = [p for p in row["offsets"] if p is not None and begin <= p[0] < end]
            kinds.add(("whole" if len(inside) == 6 else "part" if inside else "none",
                       text_of_labels(row)))  # fmt: skip
    assert kinds == {("whole", answer), ("part", ""), ("none", "")}


def logits(rows: list[dict[str, Any]], marks: dict[tuple[int, int], float]) -> Any:
    """Zeros, but (window, token) -> value."""
    found = [np.zeros(len(row["input_ids"])) for row in rows]
    for (row, token), value in marks.items():
        found[row][token] = value
    return found


def test_the_best_span_of_all_windows_is_read_back(tokenizer: Any) -> None:
    rows = windows([asked(LONG, "rome"), asked("anna likes bern .", "bern")], tokenizer, 20, 6)
    where = next(i for i, row in enumerate(rows) if text_of_labels(row) == "rome")
    last = len(rows) - 1
    starts, ends = (
        logits(rows, {
            (where, rows[where][key]): 5.0,
            (0, 12): 3.0,  # a weaker span of another window
            (last, rows[last][key]): 4.0,
        })
        for key in ("start_positions", "end_positions")
    )  # fmt: skip
    found = best_answers(rows, starts, ends, may_be_empty=False)
    assert found[0].text == "rome" and LONG[found[0].start :].startswith("rome")
    assert found[1].text == "bern" and found[0].score == 10.0


def test_no_span_ends_before_it_begins_or_lies_in_the_question(tokenizer: Any) -> None:
    rows = windows([asked("anna likes bern .", "bern")], tokenizer, 20, 6)
    context = [i for i, pair in enumerate(rows[0]["offsets"]) if pair is not None]
    backwards = logits(rows, {(0, context[3]): 9.0}), logits(rows, {(0, context[0]): 9.0})
    found = best_answers(rows, *backwards, may_be_empty=False)[0]
    assert found.score == 9.0
    in_question = logits(rows, {(0, 1): 9.0}), logits(rows, {(0, 2): 9.0})
    assert best_answers(rows, *in_question, may_be_empty=False)[0].score == 0.0


def test_no_answer_is_given_only_where_it_was_learnt(tokenizer: Any) -> None:
    rows = windows([asked("anna likes bern .", "")], tokenizer, 20, 6)
    nothing = logits(rows, {(0, 0): 2.0}), logits(rows, {(0, 0): 2.0})
    assert best_answers(rows, *nothing, may_be_empty=True)[0].text == ""
    assert best_answers(rows, *nothing, may_be_empty=True)[0].start == -1
    assert best_answers(rows, *nothing, may_be_empty=False)[0].text != ""


def test_no_answer_needs_every_window(tokenizer: Any) -> None:
    """A window without the answer says "none" rightly; one with it says less so."""
    rows = windows([asked(LONG, "rome")], tokenizer, 20, 6)
    where = next(i for i, row in enumerate(rows) if text_of_labels(row) == "rome")
    none = {(i, 0): 6.0 for i in range(len(rows)) if i != where}
    starts, ends = (
        logits(rows, none | {(where, rows[where][key]): 4.0})
        for key in ("start_positions", "end_positions")
    )
    found = best_answers(rows, starts, ends, may_be_empty=True)
    assert found[0].text == "rome"
