"""Text with gaps to the words that were there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from lora_kernels.errors import ConfigError, DataError
from lora_kernels.training.config import Config
from lora_kernels.training.metrics.language import IGNORED
from lora_kernels.training.tasks.base import Features, Task, saved_length
from lora_kernels.training.tasks.language_rows import (
    CHAT,
    read_documents,
    read_language_splits,
)

_SHOWN = 5


@dataclass
class MaskedLM(Task):
    """Examples are texts; long ones go on in another row.

    Attributes:
        probability: share of the tokens to guess.
        seed: of the gaps of validation and test, which are the same in every evaluation.
    """

    probability: float = 0.15
    seed: int = 0

    name: ClassVar[str] = "masked-lm"
    usual_metric: ClassVar[str] = "perplexity"
    metrics: ClassVar[dict[str, bool]] = {"perplexity": False, "token_accuracy": True}
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    language_model: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: Config) -> MaskedLM:
        notes: list[str] = []

        def read(records: Any, notes: list[str]) -> list[str]:
            style, examples = read_documents(records, notes, config.data)
            if style == CHAT:
                raise DataError(
                    f"{records.source}: holds conversations; set data.text to the column to learn"
                )
            return examples

        splits = read_language_splits(config, read, notes)
        return cls(
            max_length=config.data.max_length, too_long=config.data.too_long, splits=splits,
            notes=notes, probability=config.data.mask_probability, seed=config.seed,
        )  # fmt: skip

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> MaskedLM:
        return cls(max_length=saved_length(saved))

    def to_saved(self) -> dict[str, Any]:
        return {"max_length": self.max_length}

    def prepare(self, model: Any, tokenizer: Any) -> None:
        if tokenizer.mask_token_id is None:
            raise ConfigError(
                "task=masked-lm needs a tokenizer with a mask token; this model has none; "
                "accepted: an encoder such as BERT"
            )

    def dataset(self, split: str, tokenizer: Any) -> Features:
        texts = self.splits[split]
        if not texts:
            return []
        if self.too_long == "refuse":
            lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
            self.count_long(split, lengths, self.max_length, "texts")
        encoded = tokenizer(
            texts, truncation=True, max_length=self.max_length, return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )  # fmt: skip
        if len(encoded["input_ids"]) > len(texts):
            self.notes.append(
                f"{split}: {len(texts)} texts in {len(encoded['input_ids'])} rows of at most "
                f"{self.max_length} tokens"
            )
        rows = [
            {"input_ids": ids, "attention_mask": mask, "special_tokens_mask": special}
            for ids, mask, special in zip(
                encoded["input_ids"], encoded["attention_mask"], encoded["special_tokens_mask"],
                strict=True,
            )
        ]  # fmt: skip
        if split == "train":
            return rows
        return self._with_gaps(rows, tokenizer)

    def _with_gaps(self, rows: Features, tokenizer: Any) -> Features:
        """The gaps are drawn once, so that before and after are asked the same; one per row at
        least."""
        import torch
        from transformers import DataCollatorForLanguageModeling

        collate = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=self.probability, seed=self.seed
        )
        generator = torch.Generator().manual_seed(self.seed)
        found = []
        for row in rows:
            batch = with_a_gap(collate([row]), [row], tokenizer, generator)
            found.append(
                {
                    "input_ids": batch["input_ids"][0].tolist(),
                    "attention_mask": row["attention_mask"],
                    "labels": batch["labels"][0].tolist(),
                }
            )
        return found

    def collator(self, tokenizer: Any, model: Any = None) -> Callable[[Features], dict[str, Any]]:
        from transformers import DataCollatorForLanguageModeling

        from lora_kernels.training.data.language_batches import LanguageBatches

        draw = DataCollatorForLanguageModeling(tokenizer, mlm_probability=self.probability)
        keep = LanguageBatches(tokenizer.pad_token_id)

        def collate(rows: Features) -> dict[str, Any]:
            if "labels" in rows[0]:
                return keep(rows)
            # The collator takes its rows apart.
            return with_a_gap(draw([dict(row) for row in rows]), rows, tokenizer, None)

        return collate

    def reduce_logits(self) -> Callable[[Any, Any], Any]:
        from lora_kernels.training.metrics.language import masked_sums

        return masked_sums

    def compute_metrics(
        self, prediction: Any, features: Features | None = None
    ) -> dict[str, float]:
        from lora_kernels.training.metrics.language import language_scores

        return language_scores(prediction.predictions)

    def predict(self, model: Any, tokenizer: Any, inputs: list[Any]) -> list[dict[str, Any]]:
        """The likeliest words for each mask token in a text."""
        import torch

        answers = []
        for text in inputs:
            batch = tokenizer(
                text, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(model.device)
            gaps = (batch["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0]
            if not len(gaps):
                raise DataError(f"the text has no {tokenizer.mask_token} to fill: {text!r:.60}")
            with torch.inference_mode():
                logits = model(**batch).logits[0, gaps].float().softmax(-1)
            best = logits.topk(min(_SHOWN, logits.shape[-1]))
            answers.append(
                {
                    "gaps": [
                        [
                            {"word": tokenizer.decode([token]).strip(), "probability": share}
                            for token, share in zip(tokens, shares, strict=True)
                        ]
                        for tokens, shares in zip(
                            best.indices.tolist(), best.values.tolist(), strict=True
                        )
                    ]
                }
            )
        return answers

    def show(self, answer: dict[str, Any]) -> str:
        return "; ".join(
            ", ".join(f"{guess['word']} {guess['probability']:.3f}" for guess in gap)
            for gap in answer["gaps"]
        )


def with_a_gap(batch: Any, rows: Features, tokenizer: Any, generator: Any) -> dict[str, Any]:
    """`batch` as it is, or with one gap where chance has drawn none: the mean loss over no gap is
    not a number.

    Args:
        rows: what the batch was made of, in its order.
        generator: of the place; None: torch's own.
    """
    import torch

    labels = batch["labels"]
    if bool((labels != IGNORED).any()):
        return dict(batch)
    places = [
        (i, j)
        for i, row in enumerate(rows)
        for j, special in enumerate(
            tokenizer.get_special_tokens_mask(row["input_ids"], already_has_special_tokens=True)
        )
        if not special
    ]
    if places:
        i, j = places[int(torch.randint(len(places), (), generator=generator))]
        if tokenizer.padding_side == "left":
            j += labels.shape[1] - len(rows[i]["input_ids"])
        labels[i, j] = batch["input_ids"][i, j]
        batch["input_ids"][i, j] = tokenizer.mask_token_id
    return dict(batch)
