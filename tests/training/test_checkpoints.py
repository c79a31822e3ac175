"""Which checkpoints count, which go, and what is said about the others; room before training."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from lora_kernels.errors import ConfigError
from lora_kernels.training.checkpoints import (
    SEAL,
    break_seal,
    discard_unfinished,
    flaw,
    last_complete,
    rotate,
    seal,
    to_resume,
)
from lora_kernels.training.preflight import check_room, checkpoint_bytes


def write(folder: Path, step: int, sealed: bool = True) -> Path:
    place = folder / f"checkpoint-{step}"
    (place / "inner").mkdir(parents=True)
    (place / "weights").write_bytes(b"x" * 100)
    (place / "inner" / "state").write_bytes(b"y")
    if sealed:
        seal(place)
    return place


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_last_finished_one_is_taken_by_number(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        write(tmp_path, step)
    write(tmp_path, 200, sealed=False)
    (tmp_path / "checkpoint-300").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-100"
    assert last_complete(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (lambda p: break_seal(p), "never finished"),
        (lambda p: (p / "weights").write_bytes(b"x" * 99), "weights has 99 bytes, not 100"),
        (lambda p: (p / "inner" / "state").unlink(), "inner/state is missing"),
        (lambda p: (p / SEAL).write_text("{"), "cannot be read"),
        (lambda p: (p / SEAL).write_text("[]"), "cannot be read"),
        (lambda p: (p / SEAL).write_text('{"files": 3}'), "cannot be read"),
    ],
)
def test_damaged_one_is_passed_over(tmp_path: Path, damage, fragment: str) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    assert flaw(bad) == "" and last_complete(tmp_path) == bad
    damage(bad)
    assert fragment in flaw(bad)
    assert last_complete(tmp_path) == good == to_resume(tmp_path)
    with pytest.raises(ConfigError, match="cannot be resumed"):
        to_resume(bad)
    assert discard_unfinished(tmp_path) == ["checkpoint-2"]
    assert names(tmp_path) == ["checkpoint-1"]


def test_nothing_to_resume_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no finished checkpoint"):
        to_resume(tmp_path)
    write(tmp_path, 4, sealed=False)
    with pytest.raises(ConfigError, match="checkpoint-4: it was never finished"):
        to_resume(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        to_resume(tmp_path / "checkpoint-9")


def test_rotation_spares_newest_best_and_unfinished(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    write(tmp_path, 9, sealed=False)
    rotate(tmp_path, None)
    rotate(tmp_path, 0)
    assert len(names(tmp_path)) == 5
    rotate(tmp_path, 2, keep=tmp_path / "checkpoint-4")
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8", "checkpoint-9"]
    rotate(tmp_path, 1, keep=tmp_path / "checkpoint-4")
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8", "checkpoint-9"]
    rotate(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-8", "checkpoint-9"]


def test_room_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_room("output", tmp_path / "not" / "there", 1000)
    assert names(tmp_path) == []
    with pytest.raises(ConfigError, match="MiB are left"):
        check_room("output", tmp_path, 2**60)

    def full(fd: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match="choose another folder"):
        check_room("output", tmp_path, 1000)


def test_place_that_cannot_be_written_is_refused() -> None:
    place = Path("/proc/sys")
    if not place.is_dir():
        pytest.skip("needs a read-only file system; /proc is not there")
    with pytest.raises(ConfigError, match="cannot be written"):
        check_room("output", place / "run", 1000)


def test_bytes_of_a_checkpoint() -> None:
    model = torch.nn.Linear(10, 5)
    model.bias.requires_grad_(False)
    assert checkpoint_bytes(model.parameters()) == 3 * 200
    assert checkpoint_bytes(model.parameters(), whole_model=True) == 3 * 200 + 20
