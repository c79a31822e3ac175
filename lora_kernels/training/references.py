"""References to data and models: plain paths, or ``package:NAME[/FOLDER]`` for installed packages.

A reference of the second form means the same on every machine, so it can stand in a shared file.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from lora_kernels.errors import ConfigError

_PREFIX = "package:"


def package_folder(key: str, reference: str) -> Path:
    """The folder that ``package:NAME[/FOLDER]`` names; the package is not imported.

    Raises:
        ConfigError: the package is not installed or has no such folder.
    """
    name, _, inner = reference.removeprefix(_PREFIX).partition("/")
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{key}={reference!r}: package {name!r} is not installed; "
            f"install it (pip install --no-deps {name.replace('_', '-')}) or give a path"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    found = (folder / inner).resolve()
    if not found.exists():
        raise ConfigError(f"{key}={reference!r}: package {name!r} holds no {inner!r}")
    return found


def data_path(key: str, reference: str) -> Path:
    """Path of a data file or folder."""
    if reference.startswith(_PREFIX):
        return package_folder(key, reference)
    return Path(reference).expanduser()


def model_path(key: str, reference: str) -> str:
    """What ``from_pretrained`` is given: a folder, a hub name, or a .gguf file.

    Below a package folder the shallowest ``config.json`` with a ``model_type`` counts, else the
    only .gguf file.

    Raises:
        ConfigError: the package is missing or holds no model, or what can only be a path is not
            there.
    """
    if not reference.startswith(_PREFIX):
        path = Path(reference).expanduser()
        if path.exists():
            return str(path)
        if reference.startswith((".", "/", "~")) or reference.count("/") > 1 or "\\" in reference:
            raise ConfigError(f"{key}={reference!r}: no such folder or file")
        return reference
    folder = package_folder(key, reference)
    if folder.is_file():
        return str(folder)
    for config in sorted(folder.rglob("config.json"), key=lambda p: (len(p.parts), p)):
        try:
            if "model_type" in json.loads(config.read_text(encoding="utf-8")):
                return str(config.parent)
        except (OSError, ValueError, TypeError):
            continue
    packed = sorted(folder.rglob("*.gguf"))
    if len(packed) == 1:
        return str(packed[0])
    found = f"; {len(packed)} .gguf files, name one" if packed else ""
    raise ConfigError(
        f"{key}={reference!r}: no config.json with a model_type below the package folder{found}"
    )
