"""The C++ tests of csrc (tests/csrc, no torch in them), built by CMake and run by ctest."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = ("dtype", "philox", "engines", "quant_linear", "gemm_sm90", "gemm_sm90_pipeline")


@pytest.mark.slow
def test_cpp(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    build = str(tmp_path)
    steps = (
        ("cmake", "-S", str(ROOT), "-B", build, "-DPython3_EXECUTABLE=/nonexistent"),
        ("cmake", "--build", build, "-j2", "--target", *(f"test_{p}" for p in PROGRAMS)),
        ("ctest", "--test-dir", build, "--output-on-failure"),
    )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(step)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    assert f"100% tests passed, 0 tests failed out of {len(PROGRAMS)}" in done.stdout
