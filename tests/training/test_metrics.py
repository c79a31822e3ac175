"""Scores against values computed by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

pytest.importorskip("torchmetrics")

from lora_kernels.training.metrics.answers import answer_scores
from lora_kernels.training.metrics.classes import class_scores, confusion, roc_area
from lora_kernels.training.metrics.language import (
    causal_sums,
    language_scores,
    masked_sums,
)
from lora_kernels.training.metrics.spans import entities, entity_scores


def one_hot(predicted: list[int], classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predicted), classes).float() * 3


def same(value: float, expected: Fraction | float) -> bool:
    """Equal in fp32, in which torchmetrics counts."""
    return torch.equal(torch.tensor(value), torch.tensor(float(expected)))


def test_class_scores_of_three_classes() -> None:
    # true      0 0 0 1 1 2
    # predicted 0 0 1 1 2 2
    target = torch.tensor([0, 0, 0, 1, 1, 2])
    logits = one_hot([0, 0, 1, 1, 2, 2], 3)
    scores = class_scores(logits, target)
    assert same(scores["accuracy"], Fraction(4, 6))
    assert same(scores["f1_micro"], Fraction(4, 6))
    # F1 per class: 2*2/(2+3), 2*1/(2+2), 2*1/(2+1)
    assert same(scores["f1_macro"], (Fraction(4, 5) + Fraction(1, 2) + Fraction(2, 3)) / 3)
    assert scores["f1"] == scores["f1_macro"] != scores["f1_micro"]
    assert confusion(logits, target) == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]


def test_area_of_two_classes_is_the_share_of_ordered_pairs() -> None:
    scores = torch.tensor([0.1, 0.4, 0.35, 0.8])
    target = torch.tensor([0, 0, 1, 1])
    # pairs (negative, positive): .1<.35 .1<.8 .4>.35 .4<.8 -> 3 of 4
    area = roc_area(torch.stack([1 - scores, scores], 1), target)
    assert same(area, Fraction(3, 4))
    assert same(roc_area(torch.stack([scores, 1 - scores], 1), target), Fraction(1, 4))


def test_area_of_three_classes_is_the_mean_of_one_against_the_rest() -> None:
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.2, 0.3]])
    target = torch.tensor([0, 1, 2])
    # class 0: .6 > .2, .5 -> 1; class 1: .5 > .3, .2 -> 1; class 2: .3 > .1, .3 = .3 -> 3/4
    assert same(roc_area(probabilities, target), Fraction(11, 12))


def test_area_is_absent_where_one_class_is_all_there_is() -> None:
    logits = one_hot([0, 1], 2)
    assert "auc_roc" not in class_scores(logits, torch.tensor([1, 1]))
    assert "auc_roc" in class_scores(logits, torch.tensor([0, 1]))


def test_causal_sums_shift_and_skip() -> None:
    # Two tokens; the logits say 3:1 for token 1 everywhere.
    logits = torch.log(torch.tensor([1.0, 3.0])).expand(2, 4, 2).clone()
    labels = torch.tensor([[0, 1, 1, 0], [-100, -100, -100, 1]])
    sums = causal_sums(logits, labels)
    # Row 1 predicts labels 1, 1, 0; row 2 only its last one. The first label is never predicted.
    assert sums[:, 1].tolist() == [3.0, 1.0] and sums[:, 2].tolist() == [2.0, 1.0]
    expected = -2 * math.log(3 / 4) - math.log(1 / 4)
    assert same(float(sums[0, 0]), expected)
    assert masked_sums(logits, labels)[:, 1].tolist() == [4.0, 1.0]


def test_perplexity_weighs_tokens_not_batches() -> None:
    # 1 token at nll log(16), 3 tokens at nll log(2): exp(mean) = (16 * 8) ** (1/4)
    sums = torch.tensor([[math.log(16), 1, 0], [3 * math.log(2), 3, 3]], dtype=torch.float64)
    scores = language_scores(sums)
    assert math.isclose(scores["perplexity"], 128**0.25)
    assert scores["token_accuracy"] == 0.75 and scores["tokens"] == 4
    per_batch = math.exp((math.log(16) + math.log(2)) / 2)
    assert not math.isclose(scores["perplexity"], per_batch)


def test_perplexity_of_a_hopeless_model_is_infinite() -> None:
    assert language_scores([[1e6, 1, 0]])["perplexity"] == math.inf


def test_answers_are_compared_as_squad_does() -> None:
    scores = answer_scores(
        ["The Eiffel Tower!", "in Paris", "nothing", ""],
        [["eiffel tower"], ["Paris", "Lyon"], ["red"], ["blue"]],
    )
    assert same(scores["exact_match"], Fraction(1, 4))
    # 1, then precision 1/2 and recall 1 -> 2/3, then 0 and 0
    assert scores["f1"] == pytest.approx((1 + 2 / 3) / 4)  # percentages in fp32 on the way


def test_no_answer_is_an_answer() -> None:
    scores = answer_scores(["", "", "x"], [[], ["a"], []])
    assert scores == {"exact_match": 1 / 3, "f1": 1 / 3}


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("I-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),
        ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
        ("B-PER E-PER S-LOC", [("PER", 0, 2), ("LOC", 2, 3)]),
        ("B-A I-A E-A I-A", [("A", 0, 3), ("A", 3, 4)]),
        ("PER PER O LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("O O", []),
    ],
)
def test_entities(tags: str, spans: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == spans


def test_entity_scores_count_whole_entities() -> None:
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O"]]
    guess = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-PER"]]
    scores = entity_scores(guess, true)
    # true: PER 0-2, LOC, LOC; found: PER 0-1 (wrong), LOC, LOC, PER (wrong)
    assert (scores["precision"], scores["recall"]) == (2 / 4, 2 / 3)
    assert scores["f1"] == 2 * 2 / (4 + 3) and scores["f1_macro"] == (0.0 + 1.0) / 2
    assert scores["accuracy"] == 4 / 6


def test_written_answers() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    from lora_kernels.training.metrics.generated import generation_scores

    exact = generation_scores(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert {round(v, 9) for v in exact.values()} == {100.0}
    scores = generation_scores(["the cat sat on mat"], ["the cat sat on the mat"])
    # n-gram precisions 5/5, 3/4, 2/3, 1/2 and the brevity penalty exp(1 - 6/5)
    bleu = 100 * math.exp(1 - 6 / 5) * (1 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert math.isclose(scores["bleu"], bleu)
    # unigrams: 5 of 5 and 5 of 6; bigrams: 3 of 4 and 3 of 5; the answer is a subsequence
    assert math.isclose(scores["rouge1"], 100 * 10 / 11)
    assert math.isclose(scores["rouge2"], 100 * 6 / 9)
    assert math.isclose(scores["rougeL"], 100 * 10 / 11)


def test_languages_without_spaces_are_counted_by_characters() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    from lora_kernels.training.metrics.generated import generation_scores

    half = generation_scores(["東京都市"], ["東京大学"], "ja")
    assert math.isclose(half["rouge1"], 50.0) and half["bleu"] > 0
    assert generation_scores(["東京"], ["大学"], "ja")["rouge1"] == 0.0
