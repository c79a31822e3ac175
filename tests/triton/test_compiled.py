"""Triton kernels compiled for GPUs that are not here."""

from __future__ import annotations

import pytest
from suite_runner import COMPILED, needs_triton, run

pytestmark = needs_triton


@pytest.mark.parametrize("suite", COMPILED)
def test_suite(suite, tmp_path):
    print(run(suite, tmp_path, "not slow"))


@pytest.mark.slow
@pytest.mark.parametrize("suite", COMPILED)
def test_slow_tests_of_suite(suite, tmp_path):
    print(run(suite, tmp_path, "slow"))
