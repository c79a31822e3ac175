"""The README's tables against what is in the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_kernels.ops import _registry

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = (
    *ROOT.glob("lora_kernels/**/*.py"), *ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.h"),
    ROOT / "setup.py",
)  # fmt: skip


def test_every_variable_that_is_read_is_documented_and_no_other() -> None:
    pattern = re.compile(r"(?:environ|getenv)\b[^\n]*?[\"'](LORA_KERNELS_[A-Z_]+)[\"']")
    read = {name for path in CODE if path.exists() for name in pattern.findall(path.read_text())}
    documented = set(re.findall(r"^\| `(LORA_KERNELS_[A-Z_]+)`", README, re.MULTILINE))
    assert "LORA_KERNELS_BACKEND" in read
    assert documented == read


@pytest.mark.parametrize("spec", _registry.OPS, ids=lambda spec: spec.name)
def test_every_op_and_backend_has_a_row(spec: _registry.OpSpec) -> None:
    table = README.partition("## What runs where")[2].partition("\n## ")[0]
    assert f"`{spec.name}`" in table
    for backend in spec.backends:
        assert f"| `{backend}` |" in table


def test_numbers_stand_in_their_place() -> None:
    begin, end = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
    assert README.count(begin) == README.count(end) == 1
    assert README.index(begin) < README.index(end)


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
