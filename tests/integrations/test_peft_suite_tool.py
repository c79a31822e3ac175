"""The verdict of tools/run_peft_suite.sh, and one run of it over a suite of two tests."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/peft_suite/run.py, with its sibling modules importable while the test runs."""
    monkeypatch.syspath_prepend(str(TOOLS / "peft_suite"))
    for name in ("compare", "sources"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("peft_suite_run", TOOLS / "peft_suite" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("compare", "sources"):
        sys.modules.pop(name, None)


def test_equal_runs_pass(tool: ModuleType) -> None:
    stock = tool.Run({"a": "passed", "b": "failed", "c": "skipped"})
    fused = tool.Run({"a": "passed", "b": "failed", "c": "skipped"}, fused_calls=5)
    assert tool.problems(stock, fused, floor=5) == []
    lines = tool.table(stock, fused).splitlines()
    assert lines[1].split() == ["stock", "1", "1", "1", "0"]
    assert lines[2].split() == ["fused", "1", "1", "1", "5"]


@pytest.mark.parametrize(
    ("outcomes", "calls", "message"),
    [
        ({"a": "failed"}, 5, "passes stock, failed fused: a"),
        ({"a": "skipped"}, 5, "passes stock, skipped fused: a"),
        ({}, 5, "passes stock, did not run fused: a"),
        ({"a": "passed"}, 4, "4 fused calls are fewer than the floor of 5"),
    ],
)
def test_what_fails(tool: ModuleType, outcomes: dict, calls: int, message: str) -> None:
    found = tool.problems(tool.Run({"a": "passed"}), tool.Run(outcomes, fused_calls=calls), 5)
    assert found == [message]


def test_nothing_compared_and_fused_stock_run_fail(tool: ModuleType) -> None:
    empty = tool.Run({"a": "failed"})
    assert "no test passed stock" in tool.problems(empty, empty, 0)[0]
    mixed = tool.Run({"a": "passed"}, fused_calls=3)
    assert "should have none" in tool.problems(mixed, mixed, 0)[0]


def test_archive_is_unpacked_without_leaving_the_folder(tool: ModuleType, tmp_path: Path) -> None:
    import sources

    top = f"peft-{sources.VERSION}"
    archive = tmp_path / "suite.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in (f"{top}/tests/test_a.py", f"{top}/src/b.py", f"{top}/tests/../../escaped.py"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"pass"))
    sources._unpack(archive, tmp_path / "out")
    files = sorted(p.name for p in tmp_path.rglob("*.py"))
    assert files == ["__init__.py", "test_a.py"]


def test_other_archive_is_refused(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sources

    def download(command: list[str], **settings: object) -> subprocess.CompletedProcess:
        folder = Path(command[command.index("--dest") + 1])
        (folder / f"peft-{sources.VERSION}.tar.gz").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("LORA_KERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sources.subprocess, "run", download)
    with pytest.raises(sources.SuiteError, match="has sha256"):
        sources.suite_folder()
    assert list(tmp_path.iterdir()) == []


_SUITE = """
import torch
from peft import LoraConfig, get_peft_model

def _model():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    return get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))

def test_any_layer_passes():
    assert _model()(torch.ones(2, 4)).shape == (2, 4)

def test_stock_layer_alone_passes():
    assert type(_model().base_model.model[0]).__module__.startswith("peft.")
"""


@pytest.mark.slow
def test_a_test_that_only_stock_passes_is_found(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(_SUITE)
    stock, fused = (
        tool.run_suite(tmp_path, "passes", fused=flag, backend="aten", file="test_it.py")
        for flag in (False, True)
    )
    assert (stock.count("passed"), stock.fused_calls) == (2, 0)
    assert (fused.count("passed"), fused.count("failed"), fused.fused_calls) == (1, 1, 1)
    assert fused.layers == {"fused": 2}
    (found,) = tool.problems(stock, fused, floor=1)
    assert found == "passes stock, failed fused: test_it.py::test_stock_layer_alone_passes"


@pytest.mark.slow
def test_empty_selection_is_an_error(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(_SUITE)
    with pytest.raises(tool.SuiteError, match="no test was selected"):
        tool.run_suite(tmp_path, "nothing", fused=False, backend="aten", file="test_it.py")
