"""Exit codes and the one-line messages of the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels import __version__
from lora_kernels.cli import main


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith("lora-kernels: error: ")
    return printed.err


@pytest.mark.parametrize("command", ["train", "predict", "env"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert f"lora-kernels {command} " in text.partition("examples:")[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"lora-kernels {__version__}\n"


@pytest.mark.parametrize("words", [[], ["fly"], ["train"], ["predict", "run"]])
def test_wrong_usage_exits_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert "usage: lora-kernels" in capsys.readouterr().err


def test_missing_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("yaml")
    assert "none.yaml cannot be read" in failure(capsys, "train", str(tmp_path / "none.yaml"))


def test_unknown_key_suggests_the_nearest(
    config_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = failure(capsys, "train", str(config_yaml), "train.learning_rat=1e-3")
    assert "'train.learning_rat'" in message and "did you mean 'train.learning_rate'?" in message


def test_bad_data(config_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = str(tmp_path / "none.csv")
    assert absent in failure(capsys, "train", str(config_yaml), f"data.path={absent}")


def test_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path) in failure(capsys, "predict", str(tmp_path), "text")


def test_empty_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "TEXT is empty" in failure(capsys, "predict", str(tmp_path), "  ")


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_kernels.environment.env", interrupted)
    assert main(["env"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_absent_extra_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, config_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "pip install 'lora-kernels[train]'" in failure(capsys, "train", str(config_yaml))


def test_help_is_quick_to_import() -> None:
    """No torch, transformers or matplotlib for a help text."""
    code = (
        "import sys\n"
        "from lora_kernels.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'matplotlib', 'yaml'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
