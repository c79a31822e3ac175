"""``package:`` references and plain paths."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lora_kernels.errors import ConfigError
from lora_kernels.training.references import data_path, model_path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package that would fail if it were imported."""
    folder = tmp_path / "boxed_model"
    (folder / "weights" / "pooling").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "config.json").write_text("not json")
    (folder / "weights" / "pooling" / "config.json").write_text('{"model_type": "deeper"}')
    (folder / "weights" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


@pytest.mark.parametrize("name", ["boxed_model", "boxed-model"])
def test_package_is_found_and_not_imported(package: Path, name: str) -> None:
    assert data_path("data.path", f"package:{name}") == package
    assert data_path("data.path", f"package:{name}/weights") == package / "weights"
    assert model_path("model", f"package:{name}") == str(package / "weights")
    assert "boxed_model" not in sys.modules


def test_package_without_a_model(package: Path) -> None:
    (package / "weights" / "config.json").unlink()
    (package / "weights" / "pooling" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no config\.json with a model_type"):
        model_path("model", "package:boxed_model")


@pytest.mark.parametrize(
    "reference", ["package:not_installed_anywhere/x", "package:", "package:a b"]
)
def test_missing_package(reference: str) -> None:
    with pytest.raises(ConfigError, match="is not installed"):
        data_path("data.path", reference)


def test_missing_folder_of_a_package(package: Path) -> None:
    with pytest.raises(ConfigError, match="holds no 'nothing'"):
        data_path("data.path", "package:boxed_model/nothing")


def test_paths_and_hub_names_pass_through(tmp_path: Path) -> None:
    assert data_path("data.path", str(tmp_path)) == tmp_path
    assert model_path("model", str(tmp_path)) == str(tmp_path)
    assert model_path("model", "some-org/some-model") == "some-org/some-model"
