"""Output folders that are either complete or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_kernels.errors import ConfigError

# The file that is in every finished run, and nowhere else.
MARKER = "report.json"


def check_output(target: Path) -> None:
    """Refuses a target that is no folder, or a folder that is not an earlier run.

    Raises:
        ConfigError: with what to do.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError(f"output={str(target)!r} is a file; accepted: a folder to write")
    if target.is_dir() and any(target.iterdir()) and not (target / MARKER).is_file():
        raise ConfigError(
            f"output={str(target)!r} holds files that are not an earlier run; "
            "choose another folder or empty it"
        )
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"output={str(target)!r}: {str(parent)!r} is not a writable folder")


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends without an error.

    On an error, an interrupt included, it vanishes and `target` is as it was.
    """
    check_output(target)
    target = target.absolute()
    made = [p for p in target.parents if not p.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield stage
        _open_up(stage)
        _swap(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for parent in made:
            # Only what this run made and left empty.
            with suppress(OSError):
                parent.rmdir()


def _open_up(stage: Path) -> None:
    """Modes as files made in the usual way have: temporary files are private to their owner."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (stage, *stage.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _swap(stage: Path, target: Path) -> None:
    """`target` becomes `stage`; an earlier `target` is removed only once the new one is there."""
    if not target.exists():
        os.replace(stage, target)
        return
    earlier = stage.with_name(stage.name + "-earlier")
    os.replace(target, earlier)
    try:
        os.replace(stage, target)
    except OSError:
        os.replace(earlier, target)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
