"""Text to its continuation: whole texts, or conversations of which the answers are learnt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from lora_kernels.errors import ConfigError, DataError
from lora_kernels.training.config import Config
from lora_kernels.training.data.chat import Message, encode, prompt_text
from lora_kernels.training.data.packing import (
    Piece,
    cut,
    cut_stream,
    one_per_row,
    pack_documents,
)
from lora_kernels.training.metrics.language import IGNORED
from lora_kernels.training.tasks.base import Features, Task, saved_length
from lora_kernels.training.tasks.language_rows import (
    TEXT,
    keep_apart,
    read_documents,
    read_language_splits,
)

Example = str | list[Message]
_ANSWER_TOKENS = 64


@dataclass
class CausalLM(Task):
    """Examples are texts or conversations.

    Attributes:
        style: ``text`` or ``chat``.
        packing: as configured; ``auto`` is decided by :meth:`prepare`.
        apart: how the model is told where packed documents begin.
        mask_dtype: of a mask that says so.
    """

    style: str = TEXT
    packing: str = "auto"
    apart: str = ""
    mask_dtype: Any = None

    name: ClassVar[str] = "causal-lm"
    usual_metric: ClassVar[str] = "perplexity"
    metrics: ClassVar[dict[str, bool]] = {"perplexity": False, "token_accuracy": True}
    peft_task: ClassVar[str | None] = "CAUSAL_LM"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    language_model: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: Config) -> CausalLM:
        data = config.data
        notes: list[str] = []
        styles: list[str] = []

        def read(records: Any, notes: list[str]) -> list[Example]:
            style, examples = read_documents(records, notes, data)
            styles.append(style)
            return examples

        splits: dict[str, list[Example]] = read_language_splits(config, read, notes)
        if len(set(styles)) > 1:
            raise DataError(
                "data.path, data.validation and data.test hold texts and conversations; accepted: "
                "one kind in all of them"
            )
        if data.packing == "stream" and styles[0] != TEXT:
            raise ConfigError(
                "data.packing=stream would let a conversation see the one before it; accepted "
                "for conversations: auto, documents, none"
            )
        return cls(
            max_length=data.max_length, too_long=data.too_long, splits=splits, notes=notes,
            style=styles[0], packing=data.packing,
        )  # fmt: skip

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> CausalLM:
        return cls(max_length=saved_length(saved), style=str(saved.get("style", TEXT)))

    def to_saved(self) -> dict[str, Any]:
        return {"max_length": self.max_length, "style": self.style, "packing": self.packing}

    def prepare(self, model: Any, tokenizer: Any) -> None:
        if self.style != TEXT and not tokenizer.chat_template:
            self.notes.append(
                "the tokenizer has no chat template: a line per message, the end mark behind an "
                "answer"
            )
        self.packing, self.apart, note = keep_apart(self.packing, model, tokenizer)
        self.mask_dtype = model.dtype
        self.notes.append(note)

    def dataset(self, split: str, tokenizer: Any) -> Features:
        examples = self.splits[split]
        if not examples:
            return []
        pieces = [self._piece(example, tokenizer) for example in examples]
        pieces = self._shorten(split, pieces)
        if not pieces:  # no text has two tokens
            return []
        if self.packing == "stream":
            return cut_stream(pieces, self.max_length)
        if self.packing == "documents":
            rows = pack_documents(pieces, self.max_length)
            filled = sum(len(row["input_ids"]) for row in rows) / (len(rows) * self.max_length)
            self.notes.append(
                f"{split}: {len(pieces)} pieces in {len(rows)} rows of {self.max_length} tokens, "
                f"{100 * filled:.0f} % full"
            )
            return rows
        return one_per_row(pieces)

    def _piece(self, example: Example, tokenizer: Any) -> Piece:
        if not isinstance(example, str):
            return Piece(*encode(example, tokenizer))
        ids = list(tokenizer(example)["input_ids"])
        end = tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        return Piece(ids, list(ids))

    def _shorten(self, split: str, pieces: list[Piece]) -> list[Piece]:
        """Texts go on in another piece; a conversation is cut at its end."""
        lengths = [len(piece.ids) for piece in pieces]
        if self.style == TEXT:
            if self.packing == "stream":
                return pieces
            if self.too_long == "refuse":
                self.count_long(split, lengths, self.max_length, "documents")
            parts = [part for piece in pieces for part in cut(piece, self.max_length)]
            long = sum(n > self.max_length for n in lengths)
            if long:
                self.notes.append(
                    f"{split}: {long} of {len(pieces)} documents are longer than {self.max_length} "
                    "tokens and go on in another piece"
                )
            return parts
        self.count_long(split, lengths, self.max_length, "conversations")
        size = self.max_length
        parts = [Piece(piece.ids[:size], piece.labels[:size]) for piece in pieces]
        kept = [p for p in parts if any(label != IGNORED for label in p.labels[1:])]
        if len(kept) < len(parts):
            self.notes.append(
                f"{split}: {len(parts) - len(kept)} of {len(parts)} conversations left out, as no "
                f"answer begins within {size} tokens"
            )
        if not kept:
            raise DataError(
                f"{split}: no answer begins within data.max_length={size} tokens; raise it"
            )
        return kept

    def collator(self, tokenizer: Any, model: Any = None) -> Callable[[Features], dict[str, Any]]:
        import torch

        from lora_kernels.training.data.language_batches import POSITIONS, LanguageBatches

        dtype = self.mask_dtype or torch.float32
        return LanguageBatches(tokenizer.pad_token_id, self.apart or POSITIONS, dtype)

    def reduce_logits(self) -> Callable[[Any, Any], Any]:
        from lora_kernels.training.metrics.language import causal_sums

        return causal_sums

    def compute_metrics(
        self, prediction: Any, features: Features | None = None
    ) -> dict[str, float]:
        from lora_kernels.training.metrics.language import language_scores

        return language_scores(prediction.predictions)

    def predict(self, model: Any, tokenizer: Any, inputs: list[Any]) -> list[dict[str, Any]]:
        import torch

        from lora_kernels.training.loading import longest_input

        answers = []
        for text in inputs:
            if self.style != TEXT:
                asked = prompt_text([{"role": "user", "content": text}], tokenizer)
                batch = tokenizer(asked, add_special_tokens=False, return_tensors="pt")
            else:
                batch = tokenizer(text, return_tensors="pt")
            batch = batch.to(model.device)
            size = batch["input_ids"].shape[1]
            longest = longest_input(model.config)
            if longest is not None and size >= longest:
                raise DataError(
                    f"the text has {size} tokens; this model takes fewer than {longest}"
                )
            room = _ANSWER_TOKENS if longest is None else min(_ANSWER_TOKENS, longest - size)
            with torch.inference_mode():
                ids = model.generate(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                    max_new_tokens=room, do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
            answers.append({"answer": tokenizer.decode(ids[0, size:], skip_special_tokens=True)})
        return answers

    def show(self, answer: dict[str, Any]) -> str:
        return str(answer["answer"]).strip()
