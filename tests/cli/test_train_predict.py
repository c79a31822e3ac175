"""train and predict from the command line, on a model that trains in a second."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from lora_kernels.cli import main


@pytest.fixture(scope="module")
def run(config_yaml: Path) -> Path:
    output = config_yaml.parent / "run"
    assert main(["train", str(config_yaml), "--quiet"]) == 0
    return output


def test_train_prints_the_table_and_what_to_do_next(
    config_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(config_yaml), f"output={tmp_path / 'r'}", "train.max_steps=2"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "accuracy" in printed.out and "13 of 13 layers fused" in printed.out
    assert f"lora-kernels predict {tmp_path / 'r'}" in printed.out
    assert "2 classes: money (40), sport (40)" in printed.err
    assert "training: 100%" in printed.err


def test_train_json_is_the_report(
    config_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(config_yaml), f"output={tmp_path / 'r'}", "train.max_steps=1"]
    assert main([*words, "--json", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((tmp_path / "r" / "report.json").read_text())
    assert printed.err == ""


def test_predict_one_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(run), "the striker and the goal of the match"]) == 0
    label, probability = capsys.readouterr().out.split()
    assert label == "sport" and 0.5 < float(probability) <= 1.0


def test_predict_lines_of_stdin(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("bank shares profit\n\ngoal cup league\n"))
    assert main(["predict", str(run), "-"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["money", "sport"]
    assert lines[0].endswith("bank shares profit")


def test_predict_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(run / "adapter"), "--json", "bond tax"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == "bond tax" and answer["label"] == "money"
    assert set(answer["probabilities"]) == {"money", "sport"}
    assert answer["probability"] == max(answer["probabilities"].values())
