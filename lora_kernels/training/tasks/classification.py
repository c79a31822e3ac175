"""Texts to classes: a sequence-classification head on a pretrained encoder or decoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lora_kernels.errors import DataError
from lora_kernels.training.config import Config
from lora_kernels.training.data.columns import LABEL_NAMES, TEXT_NAMES, find_column, guesses
from lora_kernels.training.data.records import Records, text_of
from lora_kernels.training.data.split import stratified_split
from lora_kernels.training.data.splits import read_splits
from lora_kernels.training.tasks.base import Features, Task, batches, saved_length, saved_names
from lora_kernels.training.tasks.labels import check_label, label_order

Example = tuple[str, str]
_SHOWN = 8


@dataclass
class Classification(Task):
    """Examples are (text, label) pairs; `labels` are in the order of the logits."""

    labels: list[str] = field(default_factory=list)

    name: ClassVar[str] = "classification"
    usual_metric: ClassVar[str] = "accuracy"
    metrics: ClassVar[dict[str, bool]] = dict.fromkeys(
        ("accuracy", "f1", "f1_macro", "f1_micro", "auc_roc"), True
    )
    peft_task: ClassVar[str | None] = "SEQ_CLS"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    @classmethod
    def from_config(cls, config: Config) -> Classification:
        data = config.data
        notes: list[str] = []
        splits = read_splits(
            config,
            lambda records, notes: _read(records, notes, config),
            lambda examples, validation, test: stratified_split(
                _labels(examples, data.path), validation, test, config.seed, data.limit
            ),
            notes,
        )
        labels = sorted({label for _, label in splits["train"]}, key=label_order)
        for name in ("validation", "test"):
            strange = sorted({label for _, label in splits[name]} - set(labels))
            if strange:
                raise DataError(
                    f"data.{name}: class {strange[0]!r} does not occur in the training data"
                )
        counts = Counter(label for part in splits.values() for _, label in part)
        shown = [f"{name} ({counts[name]})" for name in labels[:_SHOWN]]
        more = ", ..." if len(labels) > _SHOWN else ""
        notes.append(f"{len(labels)} classes: {', '.join(shown)}{more}")
        return cls(
            max_length=data.max_length, too_long=data.too_long, splits=splits, notes=notes,
            labels=labels,
        )  # fmt: skip

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> Classification:
        return cls(max_length=saved_length(saved), labels=saved_names(saved, "labels", 2))

    def to_saved(self) -> dict[str, Any]:
        return {"labels": self.labels, "max_length": self.max_length}

    def head_options(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
            "ignore_mismatched_sizes": True,  # a head for other classes is replaced
        }

    def dataset(self, split: str, tokenizer: Any) -> Features:
        examples = self.splits[split]
        if not examples:
            return []
        encoded = tokenizer([text for text, _ in examples])
        self.count_long(split, [len(ids) for ids in encoded["input_ids"]], self.max_length, "texts")
        encoded = tokenizer(
            [text for text, _ in examples], truncation=True, max_length=self.max_length
        )
        number = {name: i for i, name in enumerate(self.labels)}
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": number[label]}
            for ids, mask, (_, label) in zip(
                encoded["input_ids"], encoded["attention_mask"], examples, strict=True
            )
        ]

    def collator(self, tokenizer: Any, model: Any = None) -> Callable[[Features], dict[str, Any]]:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def compute_metrics(
        self, prediction: Any, features: Features | None = None
    ) -> dict[str, float]:
        import torch

        from lora_kernels.training.metrics.classes import class_scores, confusion

        logits = prediction.predictions
        logits = torch.as_tensor(
            logits[0] if isinstance(logits, tuple) else logits, dtype=torch.float32
        )
        target = torch.as_tensor(prediction.label_ids)
        self.details["confusion"] = {"labels": self.labels, "counts": confusion(logits, target)}
        return class_scores(logits, target)

    def predict(self, model: Any, tokenizer: Any, inputs: list[Any]) -> list[dict[str, Any]]:
        import torch

        answers = []
        for texts in batches(inputs):
            batch = tokenizer(
                texts, truncation=True, max_length=self.max_length, padding=True,
                return_tensors="pt",
            ).to(model.device)  # fmt: skip
            with torch.inference_mode():
                probabilities = model(**batch).logits.float().softmax(-1)
            for row in probabilities.tolist():
                best = max(range(len(row)), key=row.__getitem__)
                answers.append(
                    {
                        "label": self.labels[best],
                        "probability": row[best],
                        "probabilities": dict(zip(self.labels, row, strict=True)),
                    }
                )
        return answers

    def show(self, answer: dict[str, Any]) -> str:
        width = max(map(len, self.labels))
        return f"{answer['label']:<{width}}  {answer['probability']:.3f}"


def _labels(examples: Any, path: str) -> list[str]:
    labels = [label for _, label in examples]
    if len(set(labels)) < 2:
        raise DataError(f"{path}: only the class {labels[0]!r} is in it; accepted: at least two")
    return labels


def _read(records: Records, notes: list[str], config: Config) -> list[Example]:
    text = find_column(records, "data.text", config.data.text, TEXT_NAMES)
    label = find_column(records, "data.label", config.data.label, LABEL_NAMES, taken=text)
    examples = []
    for number, row in enumerate(records.rows, 1):
        pair = text_of(row, text, records, number), text_of(row, label, records, number)
        if all(pair):
            examples.append((pair[0], check_label(pair[1], records.source, number)))
    if not examples:
        raise DataError(f"{records.source}: every row has an empty {text!r} or {label!r}")
    given = {"text": config.data.text, "label": config.data.label}
    guessed = "" if records.named_by_reader else guesses(given, {"text": text, "label": label})
    dropped = len(records.rows) - len(examples)
    parts = [f"{records.source}: {len(examples)} texts", guessed]
    parts.append(f"{dropped} empty ones left out" if dropped else "")
    notes.append(", ".join(part for part in parts if part))
    return examples
