"""Reading and writing adapters in any of the formats; what a path holds is found out by looking."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lora_kernels.errors import AdapterFileError, InvalidArgumentError
from lora_kernels.modules import safetensors_file
from lora_kernels.modules.adapter_config import parse
from lora_kernels.modules.adapter_formats import loralib, torchtune
from lora_kernels.modules.adapter_formats.adapter import Adapter, Heads, check_pairs, reject
from lora_kernels.modules.adapter_tensors import PREFIX
from lora_kernels.modules.atomic_write import write_files

FORMATS = ("peft", "loralib", "torchtune")
WEIGHTS, PICKLED, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"


def read_adapter(
    path: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    enabled: Sequence[bool] | None = None,
    heads: Heads | None = None,
    strict: bool = True,
) -> tuple[Adapter, str]:
    """The adapter at `path` and the name of its format.

    A folder is PEFT's. A file is told by the names of its tensors; pickled ones are read with
    ``weights_only=True``, which runs no code. The configuration of a file is looked for beside it:
    ``NAME.adapter_config.json`` as :func:`write_adapter` leaves it, for torchtune also
    ``adapter_config.json``.

    Args:
        alpha, enabled, heads: what the file does not hold; see :func:`loralib.from_loralib` and
            :func:`torchtune.from_torchtune`. A given alpha overrides what lies beside the file.
        strict: refuse folders with features of PEFT that the other formats have no words for.

    Raises:
        AdapterFileError: nothing there, damaged, or not one of the formats.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, strict), "peft"
    state = _read_tensors(path)
    names = list(state)
    if all(name.startswith("module.") for name in names):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        names = list(state)
    beside = _beside(path)
    if any(name.startswith(PREFIX) for name in names):
        reject(path, "it is PEFT's weight file; give its folder, which has adapter_config.json too")
    if torchtune.recognised(names):
        beside = beside if beside.is_file() else path.with_name(CONFIG)
        config = _read_config(beside) if beside.is_file() else None
        return torchtune.from_torchtune(state, path, heads, alpha, config), "torchtune"
    if loralib.recognised(names):
        config = _read_config(beside) if beside.is_file() else None
        return loralib.from_loralib(state, path, alpha, enabled, config), "loralib"
    shown = names[0] if names else "no tensor at all"
    reject(path, f"its tensors are not an adapter's ({shown!r}); accepted: {', '.join(FORMATS)}")


def write_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    format: str,
    *,
    enabled: Sequence[bool] | None = None,
    heads: Heads | None = None,
) -> list[Path]:
    """Writes `adapter`: a folder for ``peft``, otherwise a file and its configuration beside it.

    All files appear complete or not at all. A path ending in ``.safetensors`` gets that format,
    any other torch's.

    Returns:
        What was written.

    Raises:
        AdapterFileError: `format` has no place for a part of the adapter, or a failed write.
        InvalidArgumentError: unknown `format`.
    """
    if format not in FORMATS:
        raise InvalidArgumentError(f"format={format!r}; accepted: {', '.join(FORMATS)}")
    path = Path(path)
    content = dict(adapter.config)
    if format == "loralib" and enabled is not None:
        content[loralib.ENABLED] = list(enabled)
    configuration = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("utf-8")
    if format == "peft":
        folder, name, beside = path, WEIGHTS, CONFIG
        state = adapter.tensors
    else:
        folder, name, beside = path.parent, path.name, _beside(path).name
        if format == "loralib":
            state = loralib.to_loralib(adapter, path, enabled)
        else:
            state = torchtune.to_torchtune(adapter, path, heads)
    state = {key: tensor.contiguous() for key, tensor in state.items()}

    def weights(file: BinaryIO) -> None:
        if name.endswith(".safetensors"):
            safetensors_file.write(file, state, {"format": "pt"})
        else:
            torch.save(state, file)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, {name: weights, beside: lambda file: file.write(configuration)})
    except (OSError, RuntimeError) as e:
        reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
        raise AdapterFileError(f"{path}: cannot be written: {reason}") from e
    return [folder / name, folder / beside]


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}.{CONFIG}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        reject(path, f"cannot be read: {e.strerror or e}")
    except ValueError as e:
        reject(path, f"not valid JSON: {e}")
    if not isinstance(content, dict) or "r" not in content or "lora_alpha" not in content:
        reject(path, "accepted: an object with r and lora_alpha")
    return content


def _read_folder(folder: Path, strict: bool) -> Adapter:
    config = _read_config(folder / CONFIG)
    if strict:
        parse((folder / CONFIG).read_bytes(), folder / CONFIG)
    pickled = not (folder / WEIGHTS).is_file() and (folder / PICKLED).is_file()
    tensors = _read_tensors(folder / (PICKLED if pickled else WEIGHTS))
    adapter = Adapter(tensors, config)
    if strict:
        check_pairs(adapter, folder)
    return adapter


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        reject(path, "no such file")
    if path.suffix == ".safetensors":
        return safetensors_file.read_file(path)[0]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as e:
        lines = str(e).splitlines() or [type(e).__name__]
        reject(path, f"cannot be read as a file of tensors: {lines[0][:160]}")
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        reject(path, "it is no state dict: accepted: a dictionary of names and tensors")
    return content
