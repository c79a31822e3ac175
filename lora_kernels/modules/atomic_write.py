"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

Writer = Callable[[BinaryIO], object]


def write_files(directory: Path, files: Mapping[str, Writer]) -> None:
    """Write each file under a temporary name in `directory`, then rename all of them.

    Nothing that was there changes before every file is complete and on disk, so a full disk or a
    failing writer leaves the old files. The temporary files are removed on failure.
    """
    tag = f"{os.getpid()}-{uuid.uuid4().hex}.tmp"
    temporary = {name: directory / f".{name}.{tag}" for name in files}
    try:
        for name, writer in files.items():
            # Not tempfile: its files are private to the user, these follow the umask.
            with open(temporary[name], "xb") as file:
                writer(file)
                file.flush()
                os.fsync(file.fileno())
        for name, path in temporary.items():
            os.replace(path, directory / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
