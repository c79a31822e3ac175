"""pytest plugin: records outcomes; with LORA_KERNELS_SUITE_FUSED=1 every LoRA model is fused.

Fused means that `lora_kernels.apply` runs whenever PEFT has put LoRA layers into a model, so a
test sees fused layers from the first call on. Written to $LORA_KERNELS_SUITE_RESULT as JSON.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

_outcomes: dict[str, str] = {}
_fused_calls: Counter[str] = Counter()
_fallbacks: Counter[str] = Counter()
_layers: Counter[str] = Counter()
_current = {"test": ""}


def _fuse_everything() -> None:
    from peft.tuners.lora.model import LoraModel

    import lora_kernels
    from lora_kernels.integrations.peft import linear

    inject, op, falls_back = LoraModel.inject_adapter, linear.lora_linear, linear.call_falls_back

    @functools.wraps(inject)
    def inject_and_apply(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        for entry in lora_kernels.apply(model).layers:
            _layers[entry.reason or "fused"] += 1
        return result

    @functools.wraps(op)
    def counted(*args: Any, **kwargs: Any) -> Any:
        _fused_calls[_current["test"]] += 1
        return op(*args, **kwargs)

    def noted(reason: str) -> bool:
        _fallbacks[reason] += 1
        return falls_back(reason)

    LoraModel.inject_adapter = inject_and_apply
    linear.lora_linear = counted
    linear.call_falls_back = noted


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """The shared code of the tests imports diffusers for one isinstance check of other tests."""
    missing = importlib.util.find_spec("diffusers") is None
    if missing:
        stand_in = types.ModuleType("diffusers")
        stand_in.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
        stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = stand_in
    if os.environ.get("LORA_KERNELS_SUITE_FUSED") == "1":
        _fuse_everything()
    try:
        return (yield)
    finally:
        if missing:
            sys.modules.pop("diffusers", None)


def pytest_runtest_logstart(nodeid: str, location: tuple[str, int | None, str]) -> None:
    _current["test"] = nodeid


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    before = _outcomes.get(report.nodeid)
    if report.failed or (report.skipped and before != "failed"):
        _outcomes[report.nodeid] = report.outcome
    elif report.when == "call" and before is None:
        _outcomes[report.nodeid] = "passed"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    target = os.environ["LORA_KERNELS_SUITE_RESULT"]
    result = {
        "outcomes": _outcomes,
        "fused_calls": sum(_fused_calls.values()),
        "tests_with_fused_calls": len(_fused_calls),
        "layers": dict(_layers),
        "fallbacks": dict(_fallbacks),
    }
    with open(target + ".part", "w") as stream:
        json.dump(result, stream)
    os.replace(target + ".part", target)
