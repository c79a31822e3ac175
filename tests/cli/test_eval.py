"""`lora-kernels eval`: the run's own figure again, other data, bad input."""

from __future__ import annotations

import json

import pytest

from lora_kernels.cli import main

pytest.importorskip("peft")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def run(config_yaml):
    assert main(["train", str(config_yaml), "--quiet"]) == 0
    return config_yaml.parent / "run"


def test_own_test_split_gives_the_reported_metric(capsys, run):
    report = json.loads((run / "report.json").read_text())
    assert main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"][found["metric"]] == report["after"]
    assert found["examples"] == report["examples"]["test"]


def test_other_data(capsys, run, tmp_path):
    rows = ["text,label", "match goal striker cup,sport", "bank shares profit tax,money"] * 3
    rows = [rows[0], *(r for r in rows if not r.startswith("text"))]
    (tmp_path / "other.csv").write_text("\n".join(rows) + "\n")
    assert main(["eval", str(run), str(tmp_path / "other.csv")]) == 0
    out = capsys.readouterr().out
    assert "6 examples" in out and "<- the run's metric" in out
    assert max(len(line) for line in out.splitlines()[1:]) <= 80


def test_bad_input(capsys, run, tmp_path):
    (tmp_path / "new.csv").write_text("text,label\nmatch,sport\nbank,weather\ngoal,sport\n")
    cases = [
        ([str(tmp_path)], "written by lora-kernels train"),
        ([str(run), str(tmp_path / "none.csv")], "none.csv"),
        ([str(run), str(tmp_path / "new.csv")], "'weather' is not one of the run's"),
        ([str(run), "--limit", "0"], "data.limit=0"),
    ]
    for words, fragment in cases:
        code = main(["eval", *words])
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert code == 2 and captured.out == "" and fragment in lines[-1], captured
