"""Output folders appear complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_kernels.errors import ConfigError
from lora_kernels.training.atomic import MARKER, check_output, staged_folder


def tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def write_run(target: Path, content: str) -> None:
    with staged_folder(target) as stage:
        (stage / MARKER).write_text(content)


def test_folder_appears_with_its_content(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "one"
    with staged_folder(target) as stage:
        (stage / "inner").mkdir()
        (stage / "inner" / "file").write_text("x")
        assert not target.exists()
    assert tree(tmp_path) == {"runs/one/inner/file": "x"}
    assert target.stat().st_mode & 0o777 == tmp_path.joinpath("runs").stat().st_mode & 0o777


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged_folder(tmp_path / "one") as stage:
        (stage / "half").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_earlier_run(tmp_path: Path) -> None:
    target = tmp_path / "one"
    write_run(target, "first")
    with pytest.raises(RuntimeError), staged_folder(target) as stage:
        (stage / MARKER).write_text("second")
        raise RuntimeError
    assert tree(tmp_path) == {f"one/{MARKER}": "first"}


def test_later_run_replaces_the_earlier_one(tmp_path: Path) -> None:
    target = tmp_path / "one"
    write_run(target, "first")
    (target / "left-over").write_text("x")
    write_run(target, "second")
    assert tree(tmp_path) == {f"one/{MARKER}": "second"}


def test_folder_that_is_no_run_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not an earlier run"), staged_folder(tmp_path):
        pass
    assert tree(tmp_path) == {"thesis.txt": "years of work"}


def test_file_is_refused_and_empty_folder_accepted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(ConfigError, match="not a writable folder"):
        check_output(tmp_path / "file" / "below")
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "empty", "x")
    assert tree(tmp_path / "empty") == {MARKER: "x"}
