"""Whether what a run will write can be written; asked before anything is trained."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_kernels.errors import ConfigError

# Reports, plots, tokenizer files, logs.
_BESIDES = 8 * 2**20


def checkpoint_bytes(parameters: Iterable[Any], whole_model: bool = False) -> int:
    """Bytes of one checkpoint with AdamW: what trains, and its two moments in the same dtype.

    Args:
        parameters: of the model.
        whole_model: frozen parameters are saved too (no PEFT adapter).
    """
    total = 0
    for p in parameters:
        size = p.numel() * p.element_size()
        total += 3 * size if p.requires_grad else size * whole_model
    return total


def check_room(key: str, folder: Path, needed: int) -> None:
    """Refuses a folder that cannot be written or has too little room, by trying.

    Args:
        key: of the configuration, for the message.
        folder: need not exist yet; its nearest existing parent is tried then.
        needed: bytes, beside a few MiB for reports.

    Raises:
        ConfigError: read-only, no permission, or less than `needed` bytes left.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    needed += _BESIDES
    try:
        # A quota or a mount option shows only when something is really written.
        with tempfile.TemporaryFile(dir=place) as probe:
            free = shutil.disk_usage(place).free
            if free < needed:
                raise ConfigError(_too_small(key, folder, needed, free))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(probe.fileno(), 0, needed)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ConfigError(_too_small(key, folder, needed, None)) from None
        if e.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            return  # the file system cannot reserve; the room was checked
        reason = e.strerror or e
        raise ConfigError(f"{key}={str(folder)!r} cannot be written: {reason}") from None


def _too_small(key: str, folder: Path, needed: int, free: int | None) -> str:
    left = "" if free is None else f", {free / 2**20:.0f} MiB are left"
    return (
        f"{key}={str(folder)!r}: the run writes about {needed / 2**20:.0f} MiB{left}; free some "
        "room, choose another folder, or lower train.save_total_limit"
    )
