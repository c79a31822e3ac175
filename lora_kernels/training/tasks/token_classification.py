"""Words to labels: names, parts of speech."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lora_kernels.errors import ConfigError, DataError
from lora_kernels.training.config import Config
from lora_kernels.training.data.columns import TAG_NAMES, TOKEN_NAMES, find_column, guesses
from lora_kernels.training.data.records import Records
from lora_kernels.training.data.split import grouped_split
from lora_kernels.training.data.splits import read_splits
from lora_kernels.training.metrics.language import IGNORED
from lora_kernels.training.metrics.spans import entities, entity_scores
from lora_kernels.training.tasks.base import Features, Task, batches, saved_length, saved_names
from lora_kernels.training.tasks.labels import check_label, label_order

Example = tuple[list[str], list[str]]
_USED = ("input_ids", "attention_mask", "token_type_ids", "labels")
_SHOWN = 8


@dataclass
class TokenClassification(Task):
    """Examples are (words, labels) pairs; the first word piece of a word carries its label.

    Attributes:
        labels: names in the order of the logits.
        all_pieces: every word piece carries the label of its word in the loss. Scores count words
            either way, by their first piece.
    """

    labels: list[str] = field(default_factory=list)
    all_pieces: bool = False

    name: ClassVar[str] = "token-classification"
    usual_metric: ClassVar[str] = "f1"
    metrics: ClassVar[dict[str, bool]] = dict.fromkeys(
        ("f1", "precision", "recall", "f1_macro", "accuracy"), True
    )
    peft_task: ClassVar[str | None] = "TOKEN_CLS"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"

    @classmethod
    def from_config(cls, config: Config) -> TokenClassification:
        notes: list[str] = []
        splits = read_splits(
            config,
            lambda records, notes: _read(records, notes, config),
            lambda examples, validation, test: grouped_split(
                [" ".join(words) for words, _ in examples],
                validation, test, config.seed, config.data.limit,
            ),
            notes,
        )  # fmt: skip
        counts = Counter(tag for _, tags in splits["train"] for tag in tags)
        labels = sorted(counts, key=label_order)
        if len(labels) < 2:
            raise DataError(
                f"{config.data.path}: only the label {labels[0]!r} is in the training data; "
                "accepted: at least two"
            )
        for name in ("validation", "test"):
            strange = sorted({tag for _, tags in splits[name] for tag in tags} - set(labels))
            if strange:
                raise DataError(
                    f"data.{name}: label {strange[0]!r} does not occur in the training data"
                )
        shown = [f"{tag} ({counts[tag]})" for tag in labels[:_SHOWN]]
        notes.append(
            f"{len(labels)} labels: {', '.join(shown)}{', ...' if len(labels) > _SHOWN else ''}"
        )
        return cls(
            max_length=config.data.max_length, too_long=config.data.too_long, splits=splits,
            notes=notes, labels=labels, all_pieces=config.data.label_all_pieces,
        )  # fmt: skip

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> TokenClassification:
        return cls(max_length=saved_length(saved), labels=saved_names(saved, "labels", 2))

    def to_saved(self) -> dict[str, Any]:
        return {"labels": self.labels, "max_length": self.max_length}

    def head_options(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
            "ignore_mismatched_sizes": True,
        }

    def prepare(self, model: Any, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                "task=token-classification needs a tokenizer that knows the words of its tokens (a "
                "fast one); this model has none"
            )
        if getattr(tokenizer, "add_prefix_space", None) is False:
            # Byte-level tokenizers take words one by one only with the space before them.
            tokenizer.add_prefix_space = True

    def dataset(self, split: str, tokenizer: Any) -> Features:
        examples = self.splits[split]
        if not examples:
            return []
        words = [example[0] for example in examples]
        lengths = [len(ids) for ids in _encode(tokenizer, words)["input_ids"]]
        self.count_long(split, lengths, self.max_length, "sentences")
        encoded = _encode(tokenizer, words, truncation=True, max_length=self.max_length)
        number = {name: i for i, name in enumerate(self.labels)}
        rows, cut = [], 0
        for i, (_, tags) in enumerate(examples):
            firsts = _first_pieces(encoded.word_ids(i))
            everywhere = self.all_pieces and split == "train"
            labels = [
                IGNORED if word is None or not (everywhere or i_first) else number[tags[word]]
                for word, i_first in firsts
            ]
            row = {key: encoded[key][i] for key in _USED if key in encoded}
            kept = sum(first for _, first in firsts)
            cut += len(tags) - kept
            rows.append({**row, "labels": labels})
        if cut:
            self.notes.append(f"{split}: {cut} words lie beyond {self.max_length} tokens and are "
                              "neither learnt nor scored")  # fmt: skip
        return rows

    def collator(self, tokenizer: Any, model: Any = None) -> Callable[[Features], dict[str, Any]]:
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(tokenizer)

    def compute_metrics(
        self, prediction: Any, features: Features | None = None
    ) -> dict[str, float]:
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        predicted, true = [], []
        counts = [[0] * len(self.labels) for _ in self.labels]
        for row, labels in zip(logits.argmax(-1), prediction.label_ids, strict=True):
            kept = [(int(p), int(t)) for p, t in zip(row, labels, strict=True) if t != IGNORED]
            predicted.append([self.labels[p] for p, _ in kept])
            true.append([self.labels[t] for _, t in kept])
            for p, t in kept:
                counts[t][p] += 1
        self.details["confusion"] = {"labels": self.labels, "counts": counts}
        return entity_scores(predicted, true)

    def predict(self, model: Any, tokenizer: Any, inputs: list[Any]) -> list[dict[str, Any]]:
        """Inputs are texts, cut at blanks, or lists of words. Answers have ``words``, ``labels``
        (None beyond max_length) and ``entities``."""
        import torch

        answers = []
        self.prepare(model, tokenizer)
        for part in batches([text.split() if isinstance(text, str) else text for text in inputs]):
            encoded = _encode(
                tokenizer, part, truncation=True, max_length=self.max_length, padding=True,
                return_tensors="pt",
            )  # fmt: skip
            with torch.inference_mode():
                logits = model(**encoded.to(model.device)).logits
            for i, words in enumerate(part):
                tags: list[str | None] = [None] * len(words)
                best = logits[i].argmax(-1).tolist()
                for place, (word, first) in enumerate(_first_pieces(encoded.word_ids(i))):
                    if first:
                        tags[word] = self.labels[best[place]]
                spans = entities([tag or "O" for tag in tags])
                answers.append(
                    {
                        "words": words,
                        "labels": tags,
                        "entities": [
                            {"kind": kind, "text": " ".join(words[a:b]), "first": a, "last": b - 1}
                            for kind, a, b in spans
                        ],
                    }
                )
        return answers

    def show(self, answer: dict[str, Any]) -> str:
        pairs = zip(answer["words"], answer["labels"], strict=True)
        return " ".join(word if tag in (None, "O") else f"{word}/{tag}" for word, tag in pairs)


def _encode(tokenizer: Any, words: list[list[str]], **options: Any) -> Any:
    return tokenizer(words, is_split_into_words=True, **options)


def _first_pieces(word_ids: list[int | None]) -> list[tuple[Any, bool]]:
    """(word or None, whether this is the word's first piece) per token."""
    before = [None, *word_ids[:-1]]
    return [
        (word, word is not None and word != previous)
        for word, previous in zip(word_ids, before, strict=True)
    ]


def _read(records: Records, notes: list[str], config: Config) -> list[Example]:
    data = config.data
    given = data.tokens or data.text
    tags = find_column(records, "data.tags", data.tags, TAG_NAMES, taken=given)
    words = find_column(records, "data.tokens", given, TOKEN_NAMES, taken=tags)
    examples = []
    for number, row in enumerate(records.rows, 1):
        where = f"{records.source}, row {number}"
        pair = _list(row[words], words, where), _list(row[tags], tags, where)
        if not pair[0]:
            continue
        if len(pair[0]) != len(pair[1]):
            raise DataError(
                f"{where}: {len(pair[0])} words in {words!r} and {len(pair[1])} labels in {tags!r}"
            )
        examples.append((pair[0], [check_label(t, records.source, number) for t in pair[1]]))
    found = guesses({"tokens": given, "tags": data.tags}, {"tokens": words, "tags": tags})
    dropped = len(records.rows) - len(examples)
    parts = [f"{records.source}: {len(examples)} sentences", found]
    parts.append(f"{dropped} empty ones left out" if dropped else "")
    notes.append(", ".join(part for part in parts if part))
    return examples


def _list(value: Any, column: str, where: str) -> list[str]:
    """Words from a list, its JSON, or a text with blanks between them."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return value.split()
        try:
            value = json.loads(value)
        except ValueError:
            return str(value).split()
    if isinstance(value, list) and all(isinstance(v, (str, int)) for v in value):
        return [str(v) for v in value]
    raise DataError(
        f"{where}: {column!r} is a {type(value).__name__}; accepted: a list of texts, or a text "
        "with blanks between the words"
    )
