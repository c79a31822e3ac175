"""Services that follow a training: told early when they do not start, ended, and not doubled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_bert import tiny_config

pytest.importorskip("peft")
pytest.importorskip("transformers")

from lora_kernels.errors import ConfigError
from lora_kernels.training.config_reader import read_config
from lora_kernels.training.stock_twin import StockTwin
from lora_kernels.training.trackers import finish_trackers, start_trackers


class WandbCallback:
    """Stands for transformers' class of this name, whose package is not needed here."""

    def setup(self, args: Any, state: Any, model: Any) -> None:
        raise RuntimeError("No API key configured.\nUse the command to log in.")


class TrackioCallback:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def setup(self, args: Any, state: Any, model: Any) -> None:
        self.calls.append("setup")

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any) -> None:
        self.calls.append("end")


def trainer(*callbacks: Any) -> Any:
    handler = SimpleNamespace(callbacks=[object(), *callbacks])
    return SimpleNamespace(
        callback_handler=handler, args=None, state=None, control=None, model=None
    )


def test_a_service_that_does_not_start_is_told_in_a_line() -> None:
    with pytest.raises(ConfigError, match="trackers='wandb' does not start: No API key") as error:
        start_trackers(trainer(WandbCallback()))
    assert "\n" not in str(error.value) and "log.jsonl" in str(error.value)


def test_a_service_is_opened_and_ended() -> None:
    service = TrackioCallback()
    start_trackers(trainer(service))
    finish_trackers(trainer(service))
    assert service.calls == ["setup", "end"]


def test_names_are_those_of_transformers() -> None:
    from transformers import integrations

    assert integrations.WandbCallback and integrations.TrackioCallback


def test_the_stock_twin_tracks_nothing(tiny_model: Path, texts_csv: Path, tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = []

    class Silent(StockTwin):
        def _send(self, message: dict[str, Any]) -> None:
            sent.append(message)

    source = {**tiny_config(tiny_model, texts_csv, tmp_path / "run"), "trackers": ["jsonl"]}
    with Silent(read_config(source), "fp32", tmp_path / "twin"):
        assert sent[0]["config"]["trackers"] == []
