"""Fixtures of the training tests: a tiny model on disk and a file of texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_bert import make_texts, write_csv, write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    return write_model(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def texts_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 texts of two classes."""
    return write_csv(tmp_path_factory.mktemp("texts") / "texts.csv", make_texts(40))
