"""Texts to classes: a sequence-classification head on a pretrained encoder or decoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lora_kernels.errors import AdapterFileError, ConfigError, DataError
from lora_kernels.training.config import Config
from lora_kernels.training.data import Records, read_records
from lora_kernels.training.data.columns import LABEL_NAMES, TEXT_NAMES, find_column
from lora_kernels.training.data.split import stratified_split
from lora_kernels.training.references import data_path

Examples = list[tuple[str, str]]
_PREDICT_BATCH = 32


@dataclass
class Classification:
    """The splits as (text, label) pairs, and the label names in the order of the logits."""

    labels: list[str]
    max_length: int
    splits: dict[str, Examples] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"
    peft_task: ClassVar[str] = "SEQ_CLS"

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(examples) for name, examples in self.splits.items()}

    @classmethod
    def from_config(cls, config: Config) -> Classification:
        data = config.data
        notes: list[str] = []
        whole = _read("data.path", data.path, config, notes)
        given = {
            name: _read(f"data.{name}", reference, config, notes)
            for name, reference in (("validation", data.validation), ("test", data.test))
            if reference is not None
        }
        indices = stratified_split(
            [label for _, label in whole],
            0.0 if "validation" in given else data.validation_fraction,
            0.0 if "test" in given else data.test_fraction,
            config.seed,
            data.limit,
        )
        splits = {
            name: given.get(name, [whole[i] for i in part])
            for name, part in zip(("train", "validation", "test"), indices, strict=True)
        }
        labels = sorted({label for _, label in splits["train"]}, key=_label_order)
        if len(labels) < 2:
            raise DataError(
                f"{data.path}: only the class {labels[0]!r} is in it; accepted: at least two"
            )
        for name in ("validation", "test"):
            strange = sorted({label for _, label in splits[name]} - set(labels))
            if strange:
                raise DataError(
                    f"data.{name}: class {strange[0]!r} does not occur in the training data"
                )
        if not splits["test"]:
            raise DataError(
                f"{data.path}: no examples are left for the test; give data.test, "
                "data.test_fraction or more examples"
            )
        counts = Counter(label for part in splits.values() for _, label in part)
        shown = [f"{name} ({counts[name]})" for name in labels[:8]]
        more = ", ..." if len(labels) > 8 else ""
        notes.append(f"{len(labels)} classes: {', '.join(shown)}{more}")
        return cls(labels, data.max_length, splits, notes)

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> Classification:
        labels, max_length = saved.get("labels"), saved.get("max_length")
        if (
            not isinstance(labels, list)
            or len(labels) < 2
            or not all(isinstance(name, str) for name in labels)
            or not isinstance(max_length, int)
        ):
            raise AdapterFileError("the saved run lacks its label names or max_length")
        return cls(labels, max_length)

    def to_saved(self) -> dict[str, Any]:
        return {"labels": self.labels, "max_length": self.max_length}

    def load_model(self, path: str, dtype: Any, options: dict[str, Any]) -> Any:
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=len(self.labels),
            id2label=dict(enumerate(self.labels)),
            label2id={name: i for i, name in enumerate(self.labels)},
            dtype=dtype,
            ignore_mismatched_sizes=True,  # a head for other classes is replaced
            **options,
        )
        longest = getattr(model.config, "max_position_embeddings", self.max_length)
        if self.max_length > longest:
            raise ConfigError(
                f"data.max_length={self.max_length} is out of range; accepted: 2 to {longest} "
                "for this model"
            )
        return model

    def dataset(self, split: str, tokenizer: Any) -> list[dict[str, Any]]:
        examples = self.splits[split]
        if not examples:
            return []
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

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        import torch
        from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

        logits = torch.as_tensor(prediction.predictions, dtype=torch.float32)
        target = torch.as_tensor(prediction.label_ids)
        classes = len(self.labels)
        return {
            "accuracy": float(multiclass_accuracy(logits, target, classes, average="micro")),
            "f1": float(multiclass_f1_score(logits, target, classes, average="macro")),
        }

    def predict(self, model: Any, tokenizer: Any, texts: list[str]) -> list[dict[str, Any]]:
        import torch

        answers = []
        for start in range(0, len(texts), _PREDICT_BATCH):
            batch = tokenizer(
                texts[start : start + _PREDICT_BATCH],
                truncation=True, max_length=self.max_length, padding=True, return_tensors="pt",
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


def _read(key: str, reference: str, config: Config, notes: list[str]) -> Examples:
    records = read_records(data_path(key, reference))
    text = find_column(records, "data.text", config.data.text, TEXT_NAMES)
    label = find_column(records, "data.label", config.data.label, LABEL_NAMES, taken=text)
    examples = [
        (row[text].strip(), row[label].strip())
        for row in records.rows
        if row[text].strip() and row[label].strip()
    ]
    if not examples:
        raise DataError(f"{records.source}: every row has an empty {text!r} or {label!r}")
    notes.append(_describe(records, text, label, len(examples), config))
    return examples


def _describe(records: Records, text: str, label: str, kept: int, config: Config) -> str:
    guessed = [] if config.data.text else [f"text={text!r}"]
    guessed += [] if config.data.label else [f"label={label!r}"]
    line = f"{records.source}: {kept} texts"
    if guessed and len(records.columns) > 2:
        line += f", columns guessed: {', '.join(guessed)}"
    dropped = len(records.rows) - kept
    return line + (f", {dropped} empty ones left out" if dropped else "")


def _label_order(label: str) -> tuple[int, float, str]:
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)
