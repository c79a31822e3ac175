"""Singular values of an update without forming it, and what is counted from them."""

from __future__ import annotations

import math

import pytest
import torch

from lora_kernels.modules.adapter_spectrum import (
    layer_spectrum,
    match_weights,
    module_of,
    pairs,
    singular_values,
)
from lora_kernels.testing import assert_within_budget


@pytest.mark.parametrize(
    ("r", "k", "n"), [(1, 5, 7), (4, 20, 33), (16, 12, 9), (8, 300, 8), (5, 5, 5)]
)
def test_singular_values_are_those_of_the_whole_update(r, k, n):
    a, b = torch.randn(r, k), torch.randn(n, r)
    got = singular_values(a, b, 0.7)
    want = torch.linalg.svdvals(0.7 * (b.double() @ a.double()))[: len(got)]
    low = torch.linalg.svdvals(0.7 * (b @ a))[: len(got)]
    assert len(got) == min(r, k, n)
    assert_within_budget(got, want, low)


def test_memory_stays_thin(monkeypatch):
    """An update of 200 000 x 200 000 would take 320 GB."""
    sigma = singular_values(torch.randn(2, 200_000), torch.randn(200_000, 2), 1.0)
    assert sigma.shape == (2,) and sigma[0] > 0


def orthonormal(rows, columns):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))[0]


def test_figures_of_known_spectra():
    a, b = orthonormal(40, 4).t(), orthonormal(30, 4)
    even = layer_spectrum("q", a, b * 2.0, 0.5, weight_norm=20.0)
    assert math.isclose(even.effective_rank, 4.0) and even.rank_at_90 == 4
    assert math.isclose(even.norm, 2.0) and math.isclose(even.share, 0.1)
    one = layer_spectrum("q", a, b * torch.tensor([1.0, 0.0, 0.0, 0.0]), 3.0)
    assert math.isclose(one.effective_rank, 1.0) and one.rank_at_90 == 1
    assert math.isclose(one.singular_values[0], 3.0) and one.share is None
    zero = layer_spectrum("q", a, b * 0.0, 3.0, weight_norm=1.0)
    assert (zero.effective_rank, zero.rank_at_90, zero.norm, zero.share) == (0.0, 0, 0.0, 0.0)


def test_convolutions_and_embeddings_count_as_matrices():
    a, b = torch.randn(3, 4, 5, 5), torch.randn(7, 3, 1, 1)
    whole = torch.einsum("or,rihw->oihw", b[:, :, 0, 0].double(), a.double())
    want = torch.linalg.svdvals(whole.flatten(1))[:3]
    got = singular_values(a, b, 1.0)
    assert_within_budget(got, want, want.float())
    tensors = {
        "base_model.model.conv.lora_A.weight": a,
        "base_model.model.conv.lora_B.weight": b,
        "base_model.model.embed.lora_embedding_A": torch.zeros(2, 50),
        "base_model.model.embed.lora_embedding_B": torch.zeros(8, 2),
        "base_model.model.head.weight": torch.zeros(2, 2),
    }
    assert list(pairs(tensors)) == ["conv", "embed"]


def test_weights_of_an_lstm_are_layers_of_their_own():
    tensors = {
        "base_model.model.lstm.lora_A.ih_l0.weight": torch.randn(2, 5),
        "base_model.model.lstm.lora_B.ih_l0.weight": torch.randn(12, 2),
        "base_model.model.lstm.lora_A.hh_l0_reverse.weight": torch.randn(2, 3),
        "base_model.model.lstm.lora_B.hh_l0_reverse.weight": torch.randn(12, 2),
    }
    assert list(pairs(tensors)) == ["lstm.ih_l0", "lstm.hh_l0_reverse"]
    assert module_of("lstm.hh_l0_reverse") == "lstm" and module_of("head") == "head"
    assert match_weights(pairs(tensors), ["lstm.weight_ih_l0", "lstm.bias_ih_l0"]) == {
        "lstm.weight_ih_l0": "lstm.ih_l0"
    }


def test_weights_are_matched_by_endings():
    layers = ["bert.encoder.layer.0.query", "bert.encoder.layer.10.query"]
    names = ["encoder.layer.0.query.weight", "encoder.layer.10.query.weight", "embeddings.weight",
             "encoder.layer.0.query.bias"]  # fmt: skip
    assert match_weights(layers, names) == {names[0]: layers[0], names[1]: layers[1]}
    assert match_weights(["h.0.attn"], ["transformer.h.0.attn.weight"]) == {
        "transformer.h.0.attn.weight": "h.0.attn"
    }
    assert match_weights(["layer.0.query"], ["layer.10.query.weight"]) == {}
