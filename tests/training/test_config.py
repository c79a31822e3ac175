"""Reading a configuration: types, ranges, overrides, and what is said about mistakes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lora_kernels.errors import ConfigError
from lora_kernels.training.config import Config
from lora_kernels.training.config_reader import read_config

pytest.importorskip("yaml")

LEAST: dict[str, Any] = {"model": "m", "output": "o", "data": {"path": "d"}}


def one_line_error(source: Any, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(source, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_those_of_the_dataclasses() -> None:
    config = read_config(LEAST)
    expected = Config(model="m", output="o")
    expected.data.path = "d"
    assert config == expected


def test_yaml_file_and_dictionary_agree(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: m\noutput: o\nkernels: no\nseed: 7\n"
        "data: {path: d, limit: 10}\nlora: {targets: [query, value]}\n"
        "train:\n  learning_rate: 5e-4\n  epochs: 2\n"
    )
    config = read_config(path)
    assert config.kernels is False and config.seed == 7 and config.data.limit == 10
    assert config.lora.targets == ["query", "value"]
    # YAML 1.1 reads 5e-4 as a text
    assert config.train.learning_rate == 5e-4
    assert config.train.epochs == 2.0 and isinstance(config.train.epochs, float)
    assert read_config(config.to_dict()) == config


def test_overrides_come_last_and_are_typed() -> None:
    config = read_config(
        LEAST, ["lora.r=8", "train.learning_rate=1e-3", "data.validation=null", "output=x=y"]
    )
    assert config.lora.r == 8 and config.train.learning_rate == 1e-3
    assert config.data.validation is None and config.output == "x=y"


def test_reading_leaves_the_source_alone() -> None:
    source = {**LEAST, "data": {"path": "d"}}
    read_config(source, ["data.limit=5"])
    assert source["data"] == {"path": "d"}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.learnin_rate", "train.learning_rate"),
        ("train.lr_warmpu", "train.lr_warmup"),
        ("epochs", "train.epochs"),
        ("lora.rank_stabilised.r", "lora"),
        ("data.max_len", "data.max_length"),
        ("modle", "model"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    message = one_line_error(LEAST, (f"{key}=1",))
    assert key.split(".")[0] in message and nearest in message


def test_unknown_key_without_a_near_one_lists_the_sections() -> None:
    message = one_line_error({**LEAST, "zzzz": 1})
    assert "'zzzz'" in message
    assert all(name in message for name in ("model", "data", "lora", "train"))


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("lora.r=0", ("lora.r=0", "1 or more")),
        ("lora.r=four", ("lora.r='four'", "an integer")),
        ("lora.r=true", ("lora.r=True", "an integer")),
        ("lora.dropout=1.5", ("lora.dropout=1.5", "0 to 1")),
        ("lora.dropout=.nan", ("lora.dropout=nan", "a number")),
        ("kernels=1", ("kernels=1", "true or false")),
        ("precision=fp8", ("precision='fp8'", "auto, fp32, bf16")),
        ("task=poetry", ("task='poetry'", "classification")),
        ("lora.targets=3", ("lora.targets=3", "a text or a list of texts")),
        ("data=3", ("data=3", "a section")),
        ("data.test_fraction=0.9", ("data.test_fraction", "below 1")),
        ("train.epochs=0", ("train.epochs=0", "train.max_steps")),
        ("train.max_steps=0", ("train.max_steps", "train nothing")),
        ("model=", ("model", "accepted")),
        ("model.name=x", ("'model.name'", "not a section")),
        ("lora.r", ("'lora.r'", "key=value")),
        ("lora.r=[", ("lora.r", "YAML")),
    ],
)
def test_bad_values_are_named(override: str, fragments: tuple[str, ...]) -> None:
    message = one_line_error(LEAST, (override,))
    assert all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize("missing", ["model", "output", "data"])
def test_missing_keys_are_named(missing: str) -> None:
    message = one_line_error({k: v for k, v in LEAST.items() if k != missing})
    assert missing in message and "missing" in message


def test_comparison_needs_kernels() -> None:
    assert "kernels" in one_line_error({**LEAST, "kernels": False, "compare_stock": True})


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"a: [", "not a YAML file"),
        (b"- a\n", "list"),
        (b"", "NoneType"),
        (b"\xff\xfe\x00", "YAML"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    message = one_line_error(path)
    assert str(path) in message and fragment in message


def test_absent_file(tmp_path: Path) -> None:
    assert "cannot be read" in one_line_error(tmp_path / "none.yaml")


def _keys(cls: type, prefix: str = "") -> list[str]:
    found = []
    for f in dataclasses.fields(cls):
        inner = f.default_factory
        if dataclasses.is_dataclass(inner):
            found += _keys(inner, f"{prefix}{f.name}.")
        else:
            assert f.metadata["help"], f.name
            found.append(prefix + f.name)
    return found


def test_documentation_lists_every_key() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    absent = [key for key in _keys(Config) if f"`{key}`" not in page]
    assert not absent
