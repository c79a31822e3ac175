"""The tests of PEFT: taken from its source distribution, kept in a cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "0.21.2"
_SHA256 = "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"


class SuiteError(Exception):
    """The suite cannot be run; the message is one line for the user."""


def cache_folder() -> Path:
    chosen = os.environ.get("LORA_KERNELS_CACHE_DIR")
    return Path(chosen) if chosen else Path.home() / ".cache" / "lora_kernels"


def suite_folder() -> Path:
    """Folder whose `tests` are those of PEFT; downloaded when it is not there."""
    folder = cache_folder() / f"peft-{VERSION}-suite"
    if (folder / "tests" / "test_custom_models.py").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        archive = _download(Path(scratch))
        _unpack(archive, Path(scratch) / "suite")
        shutil.rmtree(folder, ignore_errors=True)
        (Path(scratch) / "suite").rename(folder)
    return folder


def _download(folder: Path) -> Path:
    # pip asks the archive for its metadata, hence no isolation: setuptools is here already.
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--no-build-isolation", "--no-binary", "peft", "--dest", str(folder),
        f"peft=={VERSION}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archive = folder / f"peft-{VERSION}.tar.gz"
    if done.returncode or not archive.is_file():
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SuiteError(f"peft=={VERSION} cannot be downloaded with pip: {last}")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise SuiteError(f"{archive.name} has sha256 {digest}; expected {_SHA256}")
    return archive


def _unpack(archive: Path, folder: Path) -> None:
    """The files of `tests` alone. The archive lacks the empty file that makes it a package."""
    tests = folder / "tests"
    tests.mkdir(parents=True)
    (tests / "__init__.py").touch()
    prefix = f"peft-{VERSION}/tests/"
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(prefix)
            if member.isfile() and member.name.startswith(prefix) and "/" not in name:
                stream = tar.extractfile(member)
                assert stream is not None
                (tests / name).write_bytes(stream.read())
