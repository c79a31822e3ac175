"""Rows of tokens to batches, padded or packed; and whether a model keeps packed documents apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels.training.metrics.language import IGNORED

# Ways to tell a model where documents begin, in the order in which they are tried.
POSITIONS, FLAT, MASK = "position ids", "position ids of one flat row", "a block-diagonal mask"


@dataclass
class LanguageBatches:
    """Rows to ``input_ids``, ``labels`` and what tells documents apart.

    Rows with ``position_ids`` are packed: the batch has no 2-D mask, padding at a row's end counts
    as a document of its own. Rows without them are padded under an ``attention_mask``.

    Args:
        pad: number of the padding token.
        apart: for packed rows one of the constants of this module.
        dtype: of the block-diagonal mask.
    """

    pad: int
    apart: str = POSITIONS
    dtype: torch.dtype = torch.float32

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        if "position_ids" not in rows[0]:
            return {
                "input_ids": _stack(rows, "input_ids", self.pad),
                "attention_mask": _stack(rows, "attention_mask", 0),
                "labels": _stack(rows, "labels", IGNORED),
            }
        if self.apart == FLAT:
            return {
                key: torch.tensor([[value for row in rows for value in row[key]]])
                for key in ("input_ids", "labels", "position_ids")
            }
        batch = {
            "input_ids": _stack(rows, "input_ids", self.pad),
            "labels": _stack(rows, "labels", IGNORED),
            "position_ids": _positions(rows),
        }
        if self.apart == MASK:
            batch["attention_mask"] = document_mask(batch["position_ids"], self.dtype)
        return batch


def _stack(rows: list[dict[str, Any]], key: str, filler: int) -> Tensor:
    width = max(len(row[key]) for row in rows)
    return torch.tensor([row[key] + [filler] * (width - len(row[key])) for row in rows])


def _positions(rows: list[dict[str, Any]]) -> Tensor:
    width = max(len(row["position_ids"]) for row in rows)
    return torch.tensor(
        [[*row["position_ids"], *range(width - len(row["position_ids"]))] for row in rows]
    )


def document_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive causal mask that ends at the borders of documents.

    Args:
        positions: ``[B, T]``; a document begins wherever they do not go up by one.

    Returns:
        ``[B, 1, T, T]``: 0 where position i may look at j, else the least finite number.
    """
    steps = positions.diff(dim=-1, prepend=positions[:, :1] - 1)
    document = (steps != 1).cumsum(-1)
    same = document[:, :, None] == document[:, None, :]
    allowed = same & torch.ones_like(same).tril()
    least = torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, least)[:, None]


def way_apart(model: Any, pad: int, dtype: torch.dtype) -> tuple[str | None, str]:
    """How `model` can be told to keep packed documents apart, found by trying, and why not.

    Two documents share a row; if the logits of the second move when a token of the first changes,
    the first leaks into it. Then they are compared with those of the second document alone.

    Returns:
        One of the constants of this module, or (None, the reason).
    """
    flat_only = "flash" in str(getattr(model.config, "_attn_implementation", ""))
    reason = ""
    # A mask of ours would take the place of a sliding window too.
    windowed = getattr(model.config, "sliding_window", None) is not None
    for way in (FLAT,) if flat_only else (POSITIONS,) if windowed else (POSITIONS, MASK):
        reason = _flaw(model, LanguageBatches(pad, way, dtype))
        if not reason:
            return way, ""
    return None, reason


def _flaw(model: Any, collate: LanguageBatches) -> str:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (7, 9))
    other = [(token + 1 + i) % vocabulary for i, token in enumerate(first)]
    try:
        packed = _logits(model, collate, [first, second])[len(first) :]
        moved = _logits(model, collate, [other, second])[len(first) :]
        alone = _logits(model, collate, [second])
    except (TypeError, ValueError, RuntimeError, IndexError) as e:
        return f"it does not run with {collate.apart} ({' '.join(str(e).split())[:120]})"
    if not torch.equal(packed, moved):
        return f"with {collate.apart} a document still sees the one before it"
    size = alone.abs().amax().item()
    # Another order of summation, layer after layer; a document at wrong positions differs more.
    if (packed - alone).abs().amax().item() > 16 * torch.finfo(alone.dtype).eps * max(size, 1.0):
        return f"with {collate.apart} a packed document does not give what it gives alone"
    return ""


def _logits(model: Any, collate: LanguageBatches, documents: list[list[int]]) -> Tensor:
    row = {
        "input_ids": [token for d in documents for token in d],
        "labels": [IGNORED for d in documents for _ in d],
        "position_ids": [i for d in documents for i in range(len(d))],
    }
    batch = {key: value.to(model.device) for key, value in collate([row]).items()}
    del batch["labels"]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: Tensor = model(**batch, use_cache=False).logits[0]
    finally:
        model.train(training)
    return logits
