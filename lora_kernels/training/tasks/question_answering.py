"""A question and a text to the words of the text that answer it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from lora_kernels.errors import AdapterFileError, ConfigError, DataError
from lora_kernels.training.config import Config
from lora_kernels.training.data.answer_windows import (
    Answer,
    Question,
    best_answers,
    windows,
)
from lora_kernels.training.data.columns import (
    ANSWER_NAMES,
    CONTEXT_NAMES,
    QUESTION_NAMES,
    find_column,
    guesses,
)
from lora_kernels.training.data.records import Records, text_of
from lora_kernels.training.data.split import grouped_split
from lora_kernels.training.data.splits import read_splits
from lora_kernels.training.tasks.base import Features, Task, batches, saved_length

_USED = ("input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions")
_SAMPLES = 5


@dataclass
class QuestionAnswering(Task):
    """Examples are questions; a long context becomes several windows that overlap by `stride`."""

    stride: int = 32
    may_be_empty: bool = False  # the training had questions without an answer

    name: ClassVar[str] = "question-answering"
    usual_metric: ClassVar[str] = "f1"
    metrics: ClassVar[dict[str, bool]] = {"exact_match": True, "f1": True}
    # PEFT has a QUESTION_ANS, whose model drops token_type_ids on the way: BERT would not see where
    # the question ends.
    peft_task: ClassVar[str | None] = None
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    label_names: ClassVar[list[str] | None] = ["start_positions", "end_positions"]

    @classmethod
    def from_config(cls, config: Config) -> QuestionAnswering:
        notes: list[str] = []
        splits = read_splits(
            config,
            lambda records, notes: _read(records, notes, config),
            # Questions about one text stay together.
            lambda examples, validation, test: grouped_split(
                [q.context for q in examples], validation, test, config.seed, config.data.limit
            ),
            notes,
        )
        if not any(q.answers for q in splits["train"]):
            raise DataError(f"{config.data.path}: no question has an answer to learn")
        return cls(
            max_length=config.data.max_length, too_long=config.data.too_long, splits=splits,
            notes=notes, stride=config.data.stride,
            may_be_empty=not all(q.answers for q in splits["train"]),
        )  # fmt: skip

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> QuestionAnswering:
        if not isinstance(saved.get("stride"), int):
            raise AdapterFileError("the saved run lacks its stride")
        empty = bool(saved.get("may_be_empty"))
        return cls(max_length=saved_length(saved), stride=saved["stride"], may_be_empty=empty)

    def to_saved(self) -> dict[str, Any]:
        return {
            "max_length": self.max_length,
            "stride": self.stride,
            "may_be_empty": self.may_be_empty,
        }

    def prepare(self, model: Any, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                "task=question-answering needs a tokenizer that knows where its tokens lie in the "
                "text (a fast one); this model has none"
            )
        tokenizer.padding_side = "right"  # positions of answers count from the first token

    def dataset(self, split: str, tokenizer: Any) -> Features:
        questions = self.splits[split]
        if not questions:
            return []
        self._check_lengths(split, questions, tokenizer)
        rows: Features = windows(questions, tokenizer, self.max_length, self.stride)
        held = {
            row["number"] for row in rows if row["end_positions"] or not row["question"].answers
        }
        if len(held) < len(questions):
            self.notes.append(
                f"{split}: the answers of {len(questions) - len(held)} questions fit into no "
                "window; raise data.stride"
            )
        if len(rows) > len(questions):
            self.notes.append(
                f"{split}: {len(questions)} questions in {len(rows)} windows of "
                f"{self.max_length} tokens that overlap by {self.stride}"
            )
        return rows

    def _check_lengths(self, split: str, questions: list[Question], tokenizer: Any) -> None:
        lengths = [len(ids) for ids in tokenizer([q.question for q in questions])["input_ids"]]
        room = self.max_length - self.stride - 8
        if max(lengths) > room:
            raise DataError(
                f"{split}: a question of {max(lengths)} tokens leaves no room for its text in "
                f"data.max_length={self.max_length} with data.stride={self.stride}; raise "
                "data.max_length or lower data.stride"
            )
        if self.too_long == "refuse":
            both = tokenizer([q.question for q in questions], [q.context for q in questions])
            lengths = [len(ids) for ids in both["input_ids"]]
            self.count_long(split, lengths, self.max_length, "questions with their texts")

    def collator(self, tokenizer: Any, model: Any = None) -> Callable[[Features], dict[str, Any]]:
        from transformers import DataCollatorWithPadding

        collate = DataCollatorWithPadding(tokenizer)
        return lambda rows: dict(collate([{k: r[k] for k in _USED if k in r} for r in rows]))

    def compute_metrics(
        self, prediction: Any, features: Features | None = None
    ) -> dict[str, float]:
        from lora_kernels.training.metrics.answers import answer_scores

        if features is None:
            raise DataError("question-answering is scored against its texts; give the features")
        start, end = prediction.predictions[:2]
        found = best_answers(features, start, end, self.may_be_empty)
        questions = {row["number"]: row["question"] for row in features}
        self.details["samples"] = [
            {"question": questions[n].question, "answers": " / ".join(questions[n].accepted),
             "answer": found[n].text}
            for n in sorted(found)[:_SAMPLES]
        ]  # fmt: skip
        order = sorted(found)
        return answer_scores([found[n].text for n in order], [questions[n].accepted for n in order])

    def predict(self, model: Any, tokenizer: Any, inputs: list[Any]) -> list[dict[str, Any]]:
        """Inputs are (question, context) pairs; answers have ``answer``, ``start`` (its place in
        the context) and ``score`` (its logits less those of no answer)."""
        import torch

        self.prepare(model, tokenizer)
        questions = [Question(question, context, ()) for question, context in inputs]
        rows = windows(questions, tokenizer, self.max_length, self.stride)
        collate = self.collator(tokenizer)
        starts, ends = [], []
        for part in batches(rows):
            batch = {k: v.to(model.device) for k, v in collate(part).items() if "position" not in k}
            with torch.inference_mode():
                out = model(**batch)
            starts += list(out.start_logits.float().cpu().numpy())
            ends += list(out.end_logits.float().cpu().numpy())
        found = best_answers(rows, starts, ends, self.may_be_empty)
        return [
            {"answer": found[n].text, "start": found[n].start, "score": found[n].score}
            for n in range(len(inputs))
        ]

    def read_input(self, text: str, context: str | None = None) -> Any:
        if context is None:
            raise DataError("this run answers questions about a text; give it with --context")
        return text, context

    def show(self, answer: dict[str, Any]) -> str:
        return answer["answer"] or "(no answer in the text)"


def _read(records: Records, notes: list[str], config: Config) -> list[Question]:
    data = config.data
    question = find_column(records, "data.question", data.question, QUESTION_NAMES)
    context = find_column(records, "data.context", data.context, CONTEXT_NAMES, taken=question)
    answers = find_column(records, "data.answers", data.answers, ANSWER_NAMES, (question, context))
    start = next((c for c in ("answer_start", "start") if c in records.columns), None)
    examples, lost = [], 0
    for number, row in enumerate(records.rows, 1):
        where = f"{records.source}, row {number}"
        asked = text_of(row, question, records, number)
        # Not stripped: the places of the answers count from its first character.
        text = (
            row[context]
            if isinstance(row[context], str)
            else text_of(row, context, records, number)
        )
        if not asked or not text.strip():
            continue
        given = _answers(row[answers], row[start] if start else "", where)
        placed = [a for a in (_place(a, text) for a in given) if a is not None]
        if given and not placed:
            lost += 1
            continue
        examples.append(Question(asked, text, tuple(placed)))
    dropped = len(records.rows) - len(examples) - lost
    given_names = {"question": data.question, "context": data.context, "answers": data.answers}
    found = guesses(given_names, {"question": question, "context": context, "answers": answers})
    parts = [f"{records.source}: {len(examples)} questions", found]
    parts.append(f"{lost} whose answer is not in the text left out" if lost else "")
    parts.append(f"{dropped} empty ones left out" if dropped else "")
    notes.append(", ".join(part for part in parts if part))
    return examples


def _answers(value: Any, start: Any, where: str) -> list[Answer]:
    """Answers from SQuAD's object, a list of texts, or one text with its place beside it."""
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start", [])
        if isinstance(texts, list) and isinstance(starts, list):
            places = [*starts, *[-1] * (len(texts) - len(starts))]
            pairs = zip(texts, places, strict=False)
            return [Answer(t, int(s)) for t, s in pairs if isinstance(t, str) and t]
    elif isinstance(value, list) and all(isinstance(t, str) for t in value):
        return [Answer(t, -1) for t in value if t]
    elif isinstance(value, str):
        try:
            place = int(float(start)) if start not in ("", None) else -1
        except (TypeError, ValueError):
            raise DataError(f"{where}: the answer's place {start!r} is no number") from None
        return [Answer(value.strip(), place)] if value.strip() else []
    raise DataError(
        f"{where}: the answers are a {type(value).__name__}; accepted: a text, a list of texts, or "
        "an object with text and answer_start"
    )


def _place(answer: Answer, context: str) -> Answer | None:
    """The answer where it says it is, else where it first occurs, else None."""
    if answer.start >= 0 and context[answer.start :].startswith(answer.text):
        return answer
    found = context.find(answer.text)
    return None if found < 0 else Answer(answer.text, found)
