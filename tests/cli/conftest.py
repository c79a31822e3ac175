"""The tiny model and texts of the training tests serve here too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "training"))


@pytest.fixture(scope="session")
def config_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file that trains a tiny model in a second."""
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from tiny_bert import make_texts, tiny_config, write_csv, write_model

    folder = tmp_path_factory.mktemp("cli")
    model = write_model(folder / "model")
    data = write_csv(folder / "texts.csv", make_texts(40))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config(model, data, folder / "run", max_steps=30)))
    return path
