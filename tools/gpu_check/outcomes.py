"""A pytest plugin: one JSON line per test, written at once, and a deadline.

python -m pytest -p tools.gpu_check.outcomes --outcomes FILE --seconds 200 ...
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path)
    parser.addoption("--seconds", type=float, default=600.0)


class Outcomes:
    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.end = path, time.monotonic() + seconds

    def write(self, **entry: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write(collected=len(session.items))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="failed", why=_last_line(report))

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        self.write(begin=nodeid)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        yield
        if time.monotonic() > self.end:
            item.session.shouldstop = "the time for the tests is up"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = _last_line(report) if report.failed else ""
            self.write(test=report.nodeid, outcome=report.outcome, why=why)


def _last_line(report: Any) -> str:
    lines = str(getattr(report, "longreprtext", "")).strip().splitlines()
    errors = [line for line in lines if line.startswith("E ")]
    return " ".join((errors or lines or [""])[0].removeprefix("E ").split())[:200]


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if path is not None:
        config.pluginmanager.register(Outcomes(path, config.getoption("--seconds")))
