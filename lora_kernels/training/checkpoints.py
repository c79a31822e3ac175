"""Which of a run's checkpoints can be resumed: those that were finished, and no others.

A checkpoint is a folder ``checkpoint-<step>`` that transformers.Trainer fills file by file. When
everything is on disk, :func:`seal` adds a last file with the name and size of each. A process that
dies in between, or a copy that was cut short, leaves a folder that :func:`last_complete` skips.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from pathlib import Path

from lora_kernels.errors import ConfigError

SEAL = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path) -> None:
    """Declares `folder` finished; what was written before is on disk before the seal is."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SEAL:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"files": sizes}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / SEAL)


def break_seal(folder: Path) -> None:
    """Before `folder` is written again or removed."""
    (folder / SEAL).unlink(missing_ok=True)


def flaw(folder: Path) -> str:
    """Why `folder` cannot be resumed; empty when it can."""
    try:
        sizes = json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"]
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
    except FileNotFoundError:
        return "it was never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"{SEAL} cannot be read: {e}"
    return ""


def step_of(folder: Path) -> int:
    """The optimizer step in the folder's name; -1 when it is no checkpoint's."""
    found = _NAME.fullmatch(folder.name)
    return int(found.group(1)) if found else -1


def checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint folder in `folder`, finished or not, oldest step first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.is_dir() and step_of(p) >= 0]
    return sorted(found, key=step_of)


def last_complete(folder: Path) -> Path | None:
    """The finished checkpoint of the latest step in `folder`, or None."""
    return next((p for p in reversed(checkpoints(folder)) if not flaw(p)), None)


def to_resume(reference: Path) -> Path:
    """`reference` itself when it is a checkpoint, else the last finished one inside it.

    Raises:
        ConfigError: there is none, with what is wrong with those that are there.
    """
    if step_of(reference) >= 0:
        problem = flaw(reference) if reference.is_dir() else "no such folder"
        if problem:
            raise ConfigError(f"resume={str(reference)!r} cannot be resumed: {problem}")
        return reference
    found = last_complete(reference)
    if found is None:
        present = checkpoints(reference)
        why = f"; {present[-1].name}: {flaw(present[-1])}" if present else ""
        raise ConfigError(f"resume={str(reference)!r} holds no finished checkpoint{why}")
    return found


def discard(folder: Path) -> None:
    """Removes one checkpoint; a process that dies meanwhile leaves one that is not finished."""
    break_seal(folder)
    shutil.rmtree(folder, ignore_errors=True)


def discard_unfinished(folder: Path) -> list[str]:
    """Removes what a killed process left half-written; the names."""
    unfinished = [p for p in checkpoints(folder) if flaw(p)]
    for path in unfinished:
        discard(path)
    return [path.name for path in unfinished]


def rotate(folder: Path, limit: int | None, keep: Path | None = None) -> None:
    """Removes the oldest finished checkpoints beyond `limit`, never the newest nor `keep`."""
    if limit is None or limit <= 0:
        return
    finished = [p for p in checkpoints(folder) if not flaw(p)]
    kept = {p.resolve() for p in (finished[-1:] + ([keep] if keep else []))}
    surplus = len(finished) - max(limit, len(kept))
    for path in finished:
        if surplus > 0 and path.resolve() not in kept:
            discard(path)
            surplus -= 1
