"""Triton kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
from suite_runner import INTERPRETED, SUITES, needs_triton, run

pytestmark = needs_triton


def test_every_suite_is_of_a_known_kind():
    known = ("suite_interpreter_", "suite_ahead_of_time_")
    assert SUITES and all(suite.startswith(known) for suite in SUITES), SUITES


@pytest.mark.parametrize("suite", INTERPRETED)
def test_suite(suite, tmp_path):
    print(run(suite, tmp_path, "not slow"))


@pytest.mark.slow
@pytest.mark.parametrize("suite", INTERPRETED)
def test_slow_tests_of_suite(suite, tmp_path):
    print(run(suite, tmp_path, "slow"))
