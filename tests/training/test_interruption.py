"""A training that is killed and resumed ends like one that never stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

QUICK = ("mid-epoch", "before-sealing", "sigterm", "control")
SLOW = (
    "mid-accumulation", "after-epoch", "while-saving-optimizer", "while-saving-random-states",
    "while-rotating", "sigterm-at-epoch-end", "ctrl-c",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("killed_runs.py")


def outcomes(folder: Path, names: tuple[str, ...]) -> dict[str, dict]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *names],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return outcomes(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return outcomes(tmp_path_factory.mktemp("slow"), SLOW)


def check_killed(outcome: dict) -> None:
    assert outcome["died"] == -9 and outcome["ended"] == 0
    assert outcome["resumed_from"] not in outcome["unfinished"]
    assert outcome["equal"] and outcome["same_evaluations"]


def check_stopped(outcome: dict, name: str) -> None:
    assert outcome["died"] == 75 and outcome["ended"] == 0
    step = outcome["resumed_from"].removeprefix("checkpoint-")
    assert f"stopped by {name} after step {step} of" in outcome["message"]
    assert outcome["resumed_from"] in outcome["message"]
    assert outcome["equal"] and outcome["same_evaluations"]


def test_killed_run_resumes_to_the_same_bits(quick):
    assert quick["trained"] > 20
    check_killed(quick["mid-epoch"])


def test_half_written_checkpoint_is_passed_over(quick):
    outcome = quick["before-sealing"]
    assert len(outcome["unfinished"]) == 1
    check_killed(outcome)


def test_sigterm_saves_and_stops(quick):
    check_stopped(quick["sigterm"], "SIGTERM")


def test_run_without_its_random_states_differs(quick):
    """Control: equality of the others is not for want of randomness."""
    assert quick["control"]["ended"] == 0
    assert not quick["control"]["equal"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SLOW if not n.startswith(("sigterm", "ctrl"))])
def test_kill_at_any_moment(slow, name):
    check_killed(slow[name])
    if name.startswith("while-saving"):
        assert slow[name]["unfinished"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sent"), [("sigterm-at-epoch-end", "SIGTERM"), ("ctrl-c", "SIGINT")]
)
def test_signal_at_any_moment(slow, name, sent):
    check_stopped(slow[name], sent)
