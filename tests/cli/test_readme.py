"""The README's tables against what is in the code."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.ops import _registry

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = (
    *ROOT.glob("lora_kernels/**/*.py"), *ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.h"),
    *ROOT.glob("tools/**/*.py"), ROOT / "setup.py",
)  # fmt: skip


def test_every_variable_that_is_read_is_documented_and_no_other() -> None:
    pattern = re.compile(
        r"(?:environ\b|getenv\b|VARIABLE =)[^\n]*?[\"'](LORA_KERNELS_[A-Z_]+)[\"']"
    )
    read = {name for path in CODE if path.exists() for name in pattern.findall(path.read_text())}
    # What a tool tells its own child process is nobody's to set.
    read = {name for name in read if not name.startswith("LORA_KERNELS_SUITE_")}
    documented = set(re.findall(r"^\| `(LORA_KERNELS_[A-Z_]+)`", README, re.MULTILINE))
    assert "LORA_KERNELS_BACKEND" in read
    assert documented == read


@pytest.mark.parametrize("spec", _registry.OPS, ids=lambda spec: spec.name)
def test_every_op_and_backend_has_a_row(spec: _registry.OpSpec) -> None:
    table = README.partition("## What runs where")[2].partition("\n## ")[0]
    assert f"`{spec.name}`" in table
    for backend in spec.backends:
        assert f"`{backend}`" in table


def test_numbers_stand_in_their_place() -> None:
    begin, end = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
    assert README.count(begin) == README.count(end) == 1
    assert README.index(begin) < README.index(end)


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    shape = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    made: dict[str, Any] = {
        "lk": lk, "nn": nn, "base": transformers.BertModel(shape), "x": torch.randn(5, 8),
        "weight": torch.randn(6, 8), "lora_a": torch.randn(2, 8), "lora_b": torch.randn(6, 2),
        "bias": torch.randn(6), "scaling": 0.5, "hidden": torch.randn(2, 5, 8),
        "head": torch.randn(20, 8), "labels": torch.randint(0, 20, (2, 5)),
        "query": torch.randn(2, 7, 4, 16), "key": torch.randn(2, 7, 2, 16),
        "value": torch.randn(2, 7, 2, 16), "sinks": torch.randn(4),
        "trainer": SimpleNamespace(train=lambda: None),
    }  # fmt: skip
    for name in ("weight", "lora_a", "lora_b", "scaling"):
        made[name + "s"] = [made[name]] * 3
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        if "replace_modules" in block:
            made["model"] = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        exec(block, made)
    assert made["y"].shape == made["q"].shape == (5, 6)
    assert made["out"].shape == (2, 7, 4, 16)
    assert len(made["report"].to_dict()["layers"]) == 7
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
