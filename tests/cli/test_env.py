"""`lora-kernels env`: what it lists, and when it says that something is broken."""

from __future__ import annotations

import json
import types
from collections.abc import Callable

import pytest
import torch

import lora_kernels as lk
from lora_kernels import environment, selfcheck
from lora_kernels.cli import main
from lora_kernels.cli.env_command import as_text
from lora_kernels.ops import _registry


@pytest.fixture(scope="module")
def facts() -> dict[str, object]:
    return lk.env()


def test_every_op_and_backend_has_an_answer(facts: dict[str, dict]) -> None:
    for spec in _registry.OPS:
        answer = facts["ops"][spec.name]
        assert list(answer["backends"]) == list(spec.backends)
        for backend in answer["backends"].values():
            assert backend["reason"]
            assert (backend["self_check"] is None) == (not backend["available"])
        assert {c["backend"] for c in answer["auto"].values()} <= set(spec.backends)


def test_versions_and_status(facts: dict[str, dict]) -> None:
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["lora_kernels"] == lk.__version__
    assert facts["status"] == ("broken" if facts["problems"] else "ok")
    assert facts["gpu"]["devices"] or facts["gpu"]["reason"]


def test_json_and_text_agree_with_the_exit_code(
    facts: dict[str, dict], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["env", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["ops"].keys() == facts["ops"].keys()
    assert code == (1 if printed["problems"] else 0)
    text = as_text(facts)
    for spec in _registry.OPS:
        assert spec.name in text and all(name in text for name in spec.backends)
    # A table whose cells differ in width still has its columns under each other.
    rows = [line for line in text.splitlines() if line.startswith(("  backend ", "  reference "))]
    assert (
        len({line.index(word) for line, word in zip(rows, ("available", "yes"), strict=False)}) == 1
    )


def test_set_variables_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "nothing")
    facts = lk.env()
    assert facts["environment"]["LORA_KERNELS_DISABLE"] == "nothing"
    assert "LORA_KERNELS_DISABLE  nothing" in as_text(facts)


def test_backend_that_gives_wrong_numbers_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_kernels.ops.lora_linear import aten

    right = aten.lora_linear_fwd

    def without_lora(x, weights, lora_as, lora_bs, *rest):  # type: ignore[no-untyped-def]
        return right(x, weights, lora_as, [b * 0 for b in lora_bs], *rest)

    monkeypatch.setattr(aten, "lora_linear_fwd", without_lora)
    assert selfcheck.self_check("lora_linear", "reference") == "ok"
    assert main(["env"]) == 1
    printed = capsys.readouterr().out
    assert "BROKEN" in printed and "lora_linear, backend aten: self-check failed" in printed


def test_unusable_variable_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "abacus")
    facts = lk.env()
    assert facts["status"] == "broken"
    assert any("LORA_KERNELS_BACKEND='abacus'" in problem for problem in facts["problems"])
    assert facts["ops"]["lora_linear"]["backends"]["reference"]["self_check"] == "ok"


def pretend_native(
    monkeypatch: pytest.MonkeyPatch, load: Callable[[str], object]
) -> tuple[dict, list[str]]:
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(environment.importlib, "import_module", load)
    problems: list[str] = []
    return environment._native(problems), problems


def test_native_module_that_does_not_load_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> object:
        raise ImportError("undefined symbol:\n _ZN2at6native")

    native, problems = pretend_native(monkeypatch, load)
    assert native["built"] and not native["loads"]
    assert len(problems) == 1 and "undefined symbol: _ZN2at6native" in problems[0]


def test_native_module_for_another_torch_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(
        torch_version="1.0.0", compiler="12", isa=lambda: "avx2", machine_isas=lambda: ["avx2"]
    )
    native, problems = pretend_native(monkeypatch, lambda name: module)
    assert native["loads"] and native["isa"] == {"used": "avx2", "machine": ["avx2"]}
    assert len(problems) == 1 and "1.0.0" in problems[0] and "build it again" in problems[0]


def test_absent_native_module_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    problems: list[str] = []
    native = environment._native(problems)
    assert not native["built"] and "not built" in native["reason"] and problems == []
