"""Where the checkpoints of an unfinished run lie: in ``<output>.checkpoints``, beside the output.

They outlive a process that is killed. A finished run takes them into its own folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lora_kernels.errors import ConfigError
from lora_kernels.training.checkpoints import checkpoints, discard_unfinished, last_complete
from lora_kernels.training.checkpoints import to_resume as checkpoint_to_resume
from lora_kernels.training.config import Config

_CONFIG = "config.json"
# Another value of these leaves the steps as they were.
_FREE = ("output", "resume", "trackers", "threads", "metric")


def checkpoint_folder(output: Path) -> Path:
    output = output.absolute()
    return output.with_name(output.name + ".checkpoints")


def find_resumed(config: Config, output: Path) -> Path | None:
    """The checkpoint to go on from, or None for a new run.

    Raises:
        ConfigError: ``resume`` names none that can be used, it belongs to another configuration, or
            an unfinished run lies in the way of a new one.
    """
    home = checkpoint_folder(output)
    if config.resume is None:
        if last_complete(home) is not None:
            raise ConfigError(
                f"{home} holds checkpoints of an unfinished run; resume=auto goes on from the last "
                "one; to start anew remove that folder"
            )
        return None
    if config.resume == "auto":
        found = last_complete(home)
    else:
        found = checkpoint_to_resume(Path(config.resume).expanduser().absolute())
    if found is not None:
        _check_same(config, found.parent / _CONFIG)
    return found


def open_home(config: Config, output: Path) -> Path:
    """The folder, without what a killed process left half-written, and with the configuration."""
    home = checkpoint_folder(output)
    home.mkdir(parents=True, exist_ok=True)
    discard_unfinished(home)
    text = json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n"
    (home / _CONFIG).write_text(text, encoding="utf-8")
    return home


def leave_home(home: Path) -> None:
    """After a failure: a folder without a checkpoint goes, any other stays to be resumed."""
    if not checkpoints(home):
        shutil.rmtree(home, ignore_errors=True)


def _check_same(config: Config, path: Path) -> None:
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from None
    before = _flat(earlier)
    for key, value in _flat(config.to_dict()).items():
        if key not in _FREE and before.get(key, value) != value:
            raise ConfigError(
                f"{key}={value!r} differs from the {before[key]!r} of the run to resume; accepted: "
                "the same value, or a new run in another output"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
