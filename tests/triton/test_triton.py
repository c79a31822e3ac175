"""Runs the Triton suites in processes of their own: a process interprets or compiles, not both."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels._backends import triton as backend

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
module, reason = backend.load()
pytestmark = pytest.mark.skipif(module is None, reason=reason)


def run(suite: str, folder: Path, select: str, **environment: str) -> str:
    """The closing line of pytest on `suite`; fails with its output."""
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", select,
        "-W", "ignore::DeprecationWarning", str(HERE / suite),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=3600,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))},
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "TRITON_CACHE_DIR": str(folder),
            "TRITON_DEFAULT_FP_FUSION": "1",  # unset, triton 3.9 warns that this default will go
            **environment,
        },
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0, "\n".join(lines[-80:]) + done.stderr[-2000:]
    assert re.search(r"\d+ passed", lines[-1]), lines[-1]
    return lines[-1]


def test_interpreter(tmp_path):
    print(run("suite_interpreter.py", tmp_path, "not slow", TRITON_INTERPRET="1"))


def test_ahead_of_time(tmp_path):
    print(run("suite_ahead_of_time.py", tmp_path, "not slow"))


@pytest.mark.slow
def test_interpreter_on_larger_shapes(tmp_path):
    print(run("suite_interpreter.py", tmp_path, "slow", TRITON_INTERPRET="1"))


@pytest.mark.slow
def test_every_configuration_ahead_of_time(tmp_path):
    print(run("suite_ahead_of_time.py", tmp_path, "slow"))
