"""Text to another text: translation, summarisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from lora_kernels.errors import AdapterFileError, ConfigError, DataError
from lora_kernels.training.config import Config
from lora_kernels.training.data.columns import (
    SOURCE_NAMES,
    TARGET_NAMES,
    find_column,
    guesses,
    usual_column,
)
from lora_kernels.training.data.records import Records, text_of
from lora_kernels.training.data.split import grouped_split
from lora_kernels.training.data.splits import read_splits
from lora_kernels.training.tasks.base import Features, Task, batches, saved_length

Example = tuple[str, str]
_SAVED = ("prefix", "source_language", "target_language", "beams", "length_penalty")
_SUMMARY = ("summary", "highlights", "abstract", "title", "headline")
_SAMPLES = 5


@dataclass
class Seq2Seq(Task):
    """Examples are (source, target) pairs; the rest is as in the configuration."""

    max_target_length: int = 128
    prefix: str = ""
    source_language: str | None = None
    target_language: str | None = None
    beams: int = 1
    length_penalty: float = 1.0
    tokenizer: Any = None  # of the run, for reading what the model wrote

    name: ClassVar[str] = "seq2seq"
    usual_metric: ClassVar[str] = "bleu"
    metrics: ClassVar[dict[str, bool]] = dict.fromkeys(
        ("bleu", "chrf", "rouge1", "rouge2", "rougeL"), True
    )
    peft_task: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    generates: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: Config) -> Seq2Seq:
        from lora_kernels.training.metrics.generated import check_packages

        check_packages()
        data = config.data
        notes: list[str] = []
        targets: list[str] = []

        def read(records: Records, notes: list[str]) -> list[Example]:
            examples, target = _read(records, notes, config)
            targets.append(target)
            return examples

        splits = read_splits(
            config,
            read,
            # Equal sources stay together: a test is no test of what was learnt by heart.
            lambda examples, validation, test: grouped_split(
                [source for source, _ in examples], validation, test, config.seed, data.limit
            ),
            notes,
        )
        return cls(
            max_length=data.max_length,
            too_long=data.too_long,
            splits=splits,
            notes=notes,
            metric="rougeL" if targets[0].lower() in _SUMMARY else cls.usual_metric,
            max_target_length=data.max_target_length,
            prefix=data.prefix,
            source_language=data.source_language,
            target_language=data.target_language,
            beams=config.generation.beams,
            length_penalty=config.generation.length_penalty,
        )

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> Seq2Seq:
        length = saved.get("max_target_length")
        if not isinstance(length, int) or any(key not in saved for key in _SAVED):
            raise AdapterFileError("the saved run lacks its max_target_length or decoding options")
        return cls(
            max_length=saved_length(saved),
            max_target_length=length,
            **{key: saved[key] for key in _SAVED},
        )

    def to_saved(self) -> dict[str, Any]:
        return {
            "max_length": self.max_length,
            "max_target_length": self.max_target_length,
            **{key: getattr(self, key) for key in _SAVED},
        }

    def prepare(self, model: Any, tokenizer: Any) -> None:
        """Sets the languages of the tokenizer and how the model writes.

        Raises:
            ConfigError: the tokenizer knows no languages, or not this one.
        """
        self.tokenizer = tokenizer
        for key, attribute in (("source_language", "src_lang"), ("target_language", "tgt_lang")):
            code = getattr(self, key)
            if code is None:
                continue
            number = tokenizer.convert_tokens_to_ids(code)
            if not hasattr(tokenizer, attribute) or number in (None, tokenizer.unk_token_id):
                # Codes also name the language for the words of BLEU; that needs no such token.
                if hasattr(tokenizer, attribute):
                    raise ConfigError(f"data.{key}={code!r} is no language of this tokenizer")
                continue
            setattr(tokenizer, attribute, code)
            if attribute == "tgt_lang":
                model.generation_config.forced_bos_token_id = number
        model.generation_config.num_beams = self.beams
        model.generation_config.length_penalty = self.length_penalty if self.beams > 1 else None
        model.generation_config.max_length = None
        model.generation_config.max_new_tokens = self.max_target_length
        if model.generation_config.decoder_start_token_id is None:
            start = model.config.decoder_start_token_id
            model.generation_config.decoder_start_token_id = (
                tokenizer.pad_token_id if start is None else start
            )

    def dataset(self, split: str, tokenizer: Any) -> Features:
        examples = self.splits[split]
        if not examples:
            return []
        sources = [self.prefix + source for source, _ in examples]
        targets = [target for _, target in examples]
        lengths = [len(ids) for ids in tokenizer(sources)["input_ids"]]
        self.count_long(split, lengths, self.max_length, "sources")
        lengths = [len(ids) for ids in tokenizer(text_target=targets)["input_ids"]]
        self.count_long(split, lengths, self.max_target_length, "targets")
        encoded = tokenizer(sources, truncation=True, max_length=self.max_length)
        wanted = tokenizer(text_target=targets, truncation=True, max_length=self.max_target_length)
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": labels, "target": target,
             "source": source}
            for ids, mask, labels, target, (source, _) in zip(
                encoded["input_ids"], encoded["attention_mask"], wanted["input_ids"], targets,
                examples, strict=True,
            )
        ]  # fmt: skip

    def collator(self, tokenizer: Any, model: Any = None) -> Callable[[Features], dict[str, Any]]:
        from transformers import DataCollatorForSeq2Seq

        collate = DataCollatorForSeq2Seq(tokenizer, model=model)
        used = ("input_ids", "attention_mask", "labels")
        return lambda rows: dict(collate([{key: row[key] for key in used} for row in rows]))

    def compute_metrics(
        self, prediction: Any, features: Features | None = None
    ) -> dict[str, float]:
        from lora_kernels.training.metrics.generated import generation_scores

        if features is None:
            raise DataError("seq2seq is scored against its texts; give the features")
        answers = self._decode(prediction.predictions)
        references = [row["target"] for row in features]
        self.details["samples"] = [
            {"source": row["source"], "target": row["target"], "answer": answer}
            for row, answer in zip(features[:_SAMPLES], answers, strict=False)
        ]
        return generation_scores(answers, references, self.target_language)

    def _decode(self, ids: Any) -> list[str]:
        import numpy as np

        ids = ids[0] if isinstance(ids, tuple) else ids
        tokenizer = self.tokenizer
        ids = np.where(ids < 0, tokenizer.pad_token_id, ids)
        texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def predict(self, model: Any, tokenizer: Any, inputs: list[Any]) -> list[dict[str, Any]]:
        import torch

        self.prepare(model, tokenizer)
        answers = []
        for texts in batches(inputs):
            batch = tokenizer(
                [self.prefix + text for text in texts], truncation=True,
                max_length=self.max_length, padding=True, return_tensors="pt",
            ).to(model.device)  # fmt: skip
            with torch.inference_mode():
                ids = model.generate(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                )
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            answers += [{"answer": text.strip()} for text in texts]
        return answers

    def show(self, answer: dict[str, Any]) -> str:
        return str(answer["answer"])


def _read(records: Records, notes: list[str], config: Config) -> tuple[list[Example], str]:
    data = config.data
    records = _unfold(records)
    found_target = usual_column(records, "data.target", data.target, TARGET_NAMES, data.source)
    source = find_column(records, "data.source", data.source, SOURCE_NAMES, taken=found_target)
    target = found_target or find_column(records, "data.target", None, (), taken=source)
    examples = []
    for number, row in enumerate(records.rows, 1):
        pair = text_of(row, source, records, number), text_of(row, target, records, number)
        if all(pair):
            examples.append(pair)
    dropped = len(records.rows) - len(examples)
    found = guesses(
        {"source": data.source, "target": data.target}, {"source": source, "target": target}
    )
    parts = [f"{records.source}: {len(examples)} pairs", found]
    parts.append(f"{dropped} with an empty side left out" if dropped else "")
    notes.append(", ".join(part for part in parts if part))
    return examples, target


def _unfold(records: Records) -> Records:
    """A column of objects that hold two texts (``translation: {en: ..., de: ...}``) as two."""
    for column in records.columns:
        first = records.rows[0][column]
        if not isinstance(first, dict) or len(first) != 2:
            continue
        names = tuple(first)
        rows = []
        for number, row in enumerate(records.rows, 1):
            pair = row[column]
            if not isinstance(pair, dict) or any(not isinstance(pair.get(n), str) for n in names):
                raise DataError(
                    f"{records.source}, row {number}: {column!r} lacks a text for {names[0]!r} or "
                    f"{names[1]!r}"
                )
            rows.append({name: pair[name] for name in names})
        return Records(rows, names, records.source, records.notes)
    return records
