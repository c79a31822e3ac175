"""Packed rows: nothing is lost, nothing leaks, and the loss is that of the documents alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tiny_models import write_gpt2, write_llama

from lora_kernels.testing.budget import assert_within_budget
from lora_kernels.training.data.language_batches import (
    FLAT,
    MASK,
    POSITIONS,
    LanguageBatches,
    document_mask,
    way_apart,
)
from lora_kernels.training.data.packing import Piece, cut, cut_stream, fill, pack_documents

transformers = pytest.importorskip("transformers")


def documents(lengths: list[int], seed: int = 0) -> list[Piece]:
    draw = random.Random(seed)
    return [Piece(ids := [draw.randrange(6, 40) for _ in range(n)], list(ids)) for n in lengths]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    (write_llama if request.param == "llama" else write_gpt2)(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    loaded.config.use_cache = False
    return loaded.eval()


def test_rows_hold_every_piece_once_and_no_more_than_fits() -> None:
    draw = random.Random(1)
    lengths = [draw.randrange(1, 33) for _ in range(300)]
    rows = fill(lengths, 32)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 32
    # Best-fit decreasing needs at most 11/9 of the least possible number of rows, and 6/9 more.
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 32) + 1
    assert fill([32, 16, 16], 32) == [[0], [1, 2]]


def test_cut_goes_on_in_another_piece() -> None:
    parts = cut(Piece(list(range(10)), list(range(10))), 4)
    assert [p.ids for p in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    # One token alone predicts nothing.
    assert [len(p.ids) for p in cut(Piece([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]), 4)] == [4]


def test_no_piece_is_asked_for_the_first_token_of_the_next() -> None:
    rows = pack_documents([Piece([1, 2, 3], [1, 2, 3]), Piece([4, 5], [4, 5])], 8)
    assert rows == [
        {
            "input_ids": [1, 2, 3, 4, 5],
            "labels": [-100, 2, 3, -100, 5],
            "position_ids": [0, 1, 2, 0, 1],
        }
    ]


def test_a_stream_joins_documents() -> None:
    rows = cut_stream([Piece([1, 2, 3], [1, 2, 3]), Piece([4, 5], [4, 5])], 4)
    assert [row["input_ids"] for row in rows] == [[1, 2, 3, 4]]
    assert rows[0]["labels"] == [1, 2, 3, 4] and "position_ids" not in rows[0]


def test_padding_is_a_document_of_its_own() -> None:
    rows = pack_documents(documents([5, 4]), 5)
    batch = LanguageBatches(pad=0)(rows)
    assert "attention_mask" not in batch and batch["input_ids"][1, 4] == 0
    assert batch["labels"][1].tolist()[-1] == -100
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0]]


def test_mask_is_causal_inside_documents() -> None:
    mask = document_mask(torch.tensor([[0, 1, 0, 1, 2]]), torch.float32)
    allowed = (mask[0, 0] == 0).int().tolist()
    assert allowed == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


@pytest.mark.parametrize("way", [POSITIONS, MASK, FLAT])
def test_packed_loss_is_the_loss_of_each_document_alone(model: Any, way: str) -> None:
    pieces = documents([5, 11, 3, 9, 16, 2])
    batch = LanguageBatches(pad=0, apart=way)(pack_documents(pieces, 16))
    size = (1, 46) if way == FLAT else (3, 16)
    assert tuple(batch["input_ids"].shape) == size
    with torch.no_grad():
        packed = loss_sum(model(**{k: v for k, v in batch.items() if k != "labels"}), batch)
        alone, exact = [], []
        for precise, sums in ((False, alone), (True, exact)):
            for piece in pieces:
                one = {"input_ids": torch.tensor([piece.ids]), "labels": torch.tensor([piece.ids])}
                net = model.double() if precise else model.float()
                sums.append(loss_sum(net(input_ids=one["input_ids"]), one))
        model.float()
    truth, plain = torch.stack(exact).sum(), torch.stack(alone).sum()
    assert_within_budget(packed, truth, plain)


def test_negative_control_a_leak_changes_the_loss(model: Any) -> None:
    """Without positions and mask the second document sees the first: the test above must fail."""
    rows = pack_documents(documents([5, 11, 3, 9, 16, 2]), 16)
    leaking = {"input_ids": LanguageBatches(pad=0)(rows)["input_ids"]}
    batch = LanguageBatches(pad=0)(rows)
    apart = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        good, bad = (loss_sum(model(**x), batch) for x in (apart, leaking))
        exact = loss_sum(model.double()(**apart), batch)
        model.float()
    assert_within_budget(good, exact, good)
    with pytest.raises(AssertionError):
        assert_within_budget(bad, exact, good)


def loss_sum(out: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits, labels = out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def test_the_probe_finds_that_positions_are_enough(model: Any) -> None:
    assert way_apart(model, 0, torch.float32) == (POSITIONS, "")


class Forgetful(torch.nn.Module):
    """Passes a batch on without what tells documents apart."""

    def __init__(self, model: Any, drops: tuple[str, ...]) -> None:
        super().__init__()
        self.inner, self.drops = model, drops
        self.config, self.device = model.config, model.device

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def forward(self, **batch: Any) -> Any:
        return self.inner(**{k: v for k, v in batch.items() if k not in self.drops})


def test_negative_control_the_probe_sees_leaks(model: Any) -> None:
    way, reason = way_apart(Forgetful(model, ("position_ids", "attention_mask")), 0, torch.float32)
    assert way is None and "sees the one before" in reason
    # A mask alone keeps documents apart, but leaves the second one at the wrong positions.
    way, reason = way_apart(Forgetful(model, ("position_ids",)), 0, torch.float32)
    if model.config.model_type == "gpt2":
        assert way is None and "what it gives alone" in reason
    else:
        assert way == MASK  # rotary positions are relative: a shift changes nothing


def test_a_model_without_positions_is_told_by_the_mask(model: Any) -> None:
    class MaskOnly(Forgetful):
        def forward(self, **batch: Any) -> Any:
            if "attention_mask" not in batch:
                raise TypeError("forward() got an unexpected keyword argument 'position_ids'")
            return self.inner(**batch)

    assert way_apart(MaskOnly(model, ()), 0, torch.float32)[0] == MASK


def test_flash_attention_takes_one_flat_row(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(
        "lora_kernels.training.data.language_batches._flaw",
        lambda model, collate: tried.append(collate.apart) or "",
    )
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    assert way_apart(model, 0, torch.float32)[0] == FLAT and tried == [FLAT]
