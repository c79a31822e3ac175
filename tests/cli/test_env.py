"""`lora-kernels env`: what it lists, and when it says that something is broken."""

from __future__ import annotations

import json
import re

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
            assert backend["self_check"] in (None, "ok")
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


def test_packing_is_described_and_its_policy_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_PACK_BYTES", str(3 * 2**30))
    facts = lk.env()
    assert facts["packing"]["policy"] == "auto" and facts["packing"]["budget_bytes"] == 3 * 2**30
    assert "policy auto, budget 3.0 GiB" in as_text(facts)
    monkeypatch.setenv("LORA_KERNELS_PACK", "sometimes")
    facts = lk.env()
    assert facts["status"] == "broken" and "'sometimes'" in facts["problems"][0]
    assert "packed weights  unusable" in as_text(facts)


def test_backend_that_gives_wrong_numbers_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_kernels.ops.lora_linear import aten

    right = aten.lora_linear_fwd

    def without_lora(x, weights, lora_as, lora_bs, *rest):
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


@pytest.mark.parametrize(
    ("reason", "problems"),
    [
        ("lora_kernels._C is not built (...)", []),
        ("lora_kernels._C cannot be loaded: undefined symbol", ["undefined symbol"]),
        ("lora_kernels._C was built for torch 1.0 but torch 2.0 is installed", ["torch 1.0"]),
    ],
)
def test_native_module_may_be_absent_but_not_broken(
    monkeypatch: pytest.MonkeyPatch, reason: str, problems: list[str]
) -> None:
    monkeypatch.setattr(environment.cpu_library, "load", lambda: (None, reason))
    facts = lk.env()
    assert len(facts["problems"]) == len(problems)
    assert all(part in found for part, found in zip(problems, facts["problems"], strict=True))
    assert facts["native"] == {"available": False, "reason": reason}
    assert re.search(rf"^native module +{re.escape(reason)}$", as_text(facts), re.MULTILINE)
    assert facts["ops"]["lora_linear"]["backends"]["cpu"]["available"] is False


def test_native_module_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {
        "available": True, "torch": "2.13.0", "compiler": "12.2", "isa": "avx2",
        "machine_isas": ["baseline", "avx2"],
    }  # fmt: skip
    monkeypatch.setattr(environment.cpu_library, "build_info", lambda: info)
    text = as_text(lk.env())
    assert "uses avx2 (machine: baseline, avx2); built with torch 2.13.0, compiler 12.2" in text
