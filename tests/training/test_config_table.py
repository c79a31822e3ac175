"""One table of keys feeds --help and the page; keys of other tasks are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_kernels.errors import ConfigError
from lora_kernels.training.config_checks import _ONLY
from lora_kernels.training.config_reader import read_config
from lora_kernels.training.config_table import help_text, markdown_table, rows

pytest.importorskip("yaml")
PAGE = Path(__file__).parents[2] / "docs" / "training.md"
LEAST = {"model": "m", "output": "o", "data": {"path": "d"}}


def test_the_page_has_the_table_as_it_is() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = text.partition("<!-- keys -->\n")[2].partition("\n<!-- /keys -->")[0]
    assert shown == markdown_table()


def test_help_names_every_key_with_its_default() -> None:
    text = help_text(74)
    assert all(f"\n  {row.key}\n" in text for row in rows())
    assert max(map(len, text.splitlines())) <= 80
    keys = {row.key: row for row in rows()}
    assert keys["lora.r"].default == "16" and keys["model"].default == "needed"
    assert "cosine" in keys["train.scheduler"].accepted and keys["data.text"].default == ""


def test_every_restricted_key_exists() -> None:
    assert set(_ONLY) <= {row.key for row in rows()}


@pytest.mark.parametrize("override", ["data.question=q", "data.packing=none", "generation.beams=2"])
def test_keys_of_another_task_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="means nothing to task=classification"):
        read_config(LEAST, [override])


def test_lists_may_be_words_with_commas() -> None:
    config = read_config(LEAST, ["lora.exclude=a, b", "trackers=jsonl"])
    assert config.lora.exclude == ["a", "b"] and config.trackers == ["jsonl"]


def test_sections_of_other_methods_are_left_alone() -> None:
    config = read_config({**LEAST, "method": "freeze", "lora": {"r": 4}, "freeze": {"layers": 1}})
    assert config.lora.r == 4 and config.freeze.layers == 1
