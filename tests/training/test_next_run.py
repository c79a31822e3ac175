"""A model that was trained in full is the base of the next run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import task_config, write_data, write_gpt2

pytest.importorskip("peft")
pytest.importorskip("transformers")

from lora_kernels.errors import ConfigError
from lora_kernels.training import finetune
from lora_kernels.training.loading import load_tokenizer


def test_a_whole_model_is_saved_with_its_tokenizer(tmp_path: Path) -> None:
    model, data = write_gpt2(tmp_path / "model"), write_data("causal-lm", tmp_path)
    first = finetune(
        task_config("causal-lm", model, data, tmp_path / "first", max_steps=4),
        ["method=full"],
        quiet=True,
    )
    again = finetune(
        task_config("causal-lm", first.adapter, data, tmp_path / "again", max_steps=1),
        ["method=full"],
        quiet=True,
    )
    # The same texts as the same tokens: the second run begins where the first one ended.
    assert again.report["before"] == first.report["after"] < first.report["before"]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_gpt2(tmp_path / "model")
    assert len(load_tokenizer(str(folder))) > 20
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ConfigError, match="no tokenizer can be loaded") as caught:
        load_tokenizer(str(folder))
    assert "\n" not in str(caught.value)
