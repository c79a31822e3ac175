"""Runs the Triton suites in processes of their own: a process interprets or compiles, not both.

Every suite_interpreter_<op>.py and suite_ahead_of_time_<op>.py beside this file is run, its slow
tests apart; a suite without slow tests says so. Each kind has a test file: two workers
share them.
"""

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
NOTHING_COLLECTED = 5
SUITES = sorted(path.stem for path in HERE.glob("suite_*_*.py"))
INTERPRETED = [suite for suite in SUITES if suite.startswith("suite_interpreter_")]
COMPILED = [suite for suite in SUITES if suite.startswith("suite_ahead_of_time_")]
module, reason = backend.load()
needs_triton = pytest.mark.skipif(module is None, reason=reason)


def run(suite: str, folder: Path, select: str) -> str:
    """The closing line of pytest on `suite`; fails with its output."""
    interpret = {"TRITON_INTERPRET": "1"} if suite.startswith("suite_interpreter_") else {}
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", select,
        "-W", "ignore::DeprecationWarning", str(HERE / f"{suite}.py"),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=7200,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))},
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "TRITON_CACHE_DIR": str(folder),
            "TRITON_DEFAULT_FP_FUSION": "1",  # unset, triton 3.9 warns that this default will go
            **interpret,
        },
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if select == "slow" and done.returncode == NOTHING_COLLECTED:
        pytest.skip(f"{suite} has no slow tests")
    assert done.returncode == 0, "\n".join(lines[-80:]) + done.stderr[-2000:]
    assert re.search(r"\d+ passed", lines[-1]), lines[-1]
    return lines[-1]
