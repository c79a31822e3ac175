"""Save and load adapters in PEFT's format: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from lora_kernels.errors import AdapterFileError, InvalidArgumentError
from lora_kernels.modules import adapter_config, safetensors_file
from lora_kernels.modules.adapter_config import TASK_TYPES
from lora_kernels.modules.adapter_describe import describe, warn_about_unsaved
from lora_kernels.modules.adapter_match import Match, match
from lora_kernels.modules.adapter_tensors import PREFIX, of_layer, sort_tensors, whole
from lora_kernels.modules.atomic_write import write_files
from lora_kernels.modules.eligibility import check_dtype
from lora_kernels.modules.layer_types import ADAPTED, lstm_kinds
from lora_kernels.modules.replace import backend_for, find_saved_modules, install
from lora_kernels.modules.report import FUSED, LayerReport, Report
from lora_kernels.modules.traversal import (
    named_modules,
    refuse_peft,
    require_lora_layers,
    unwrap,
)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    modules_to_save: Sequence[str] | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write the adapter of `model` so that PEFT and :func:`load_adapter` can read it.

    Both files are written under temporary names and renamed when both are complete: on an error
    what was in `directory` is still there.

    Args:
        model: holds LoRALinear layers; may be wrapped by DDP or torch.compile. With FSDP2 every
            rank must call, as parameters are gathered.
        directory: created when absent.
        modules_to_save: names or endings of modules to write whole; None means those that
            :func:`replace_modules` or :func:`load_adapter` were told to keep trainable.
        base_model_name_or_path: goes into the configuration; None takes it from `model.config`.
        task_type: PEFT's, e.g. ``"CAUSAL_LM"``; only AutoPeftModel classes need it.

    Ranks, alphas and rsLoRA may differ between layers. Dropout may, too, but the format has room
    for one value: the most common is written, with a warning.

    Raises:
        InvalidArgumentError: a PEFT model, no LoRALinear, or a model that the format cannot
            describe (DoRA on some layers only, say).
        AdapterFileError: the files cannot be written.
    """
    folder = _folder(directory)
    layers = require_lora_layers(model, "its own save_pretrained(directory)")
    model = unwrap(model)
    if task_type is not None and task_type not in TASK_TYPES:
        raise InvalidArgumentError(f"task_type={task_type!r}; accepted: {', '.join(TASK_TYPES)}")
    if modules_to_save is not None:
        saved = find_saved_modules(model, modules_to_save)
    else:
        everything = named_modules(model, duplicates=False)
        saved = {n: m for n, m in everything if getattr(m, "saved_with_adapter", False)}
    if base_model_name_or_path is None:
        name = getattr(getattr(model, "config", None), "_name_or_path", None)
        base_model_name_or_path = name if isinstance(name, str) and name else None
    config = describe(model, layers, list(saved), base_model_name_or_path, task_type)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= of_layer(name, layer)
    for name, module in saved.items():
        for key, tensor in module.state_dict().items():
            tensors[f"{PREFIX}{name}.{key}"] = whole(tensor)
    warn_about_unsaved(model, saved)

    def write_weights(file: BinaryIO) -> None:
        safetensors_file.write(file, tensors, {"format": "pt"})

    content = config.to_json()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, {WEIGHTS: write_weights, CONFIG: lambda f: f.write(content)})
    except OSError as error:
        raise AdapterFileError(f"{folder}: cannot be written: {error.strerror or error}") from error


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_dtype: torch.dtype | None = None,
) -> Report:
    """Read an adapter that :func:`save_adapter` or PEFT wrote into `model`, in place.

    Layers that the adapter is for become LoRALinear (LoRAEmbedding, ... by their kind) and
    everything else is frozen, as :func:`replace_modules` does. Adapted layers must have the file's
    rank;
    they take its alpha and scaling rule and keep their dropout, and when there are only such
    layers nothing is frozen or unfrozen. Modules that the adapter saved whole (`modules_to_save`)
    are overwritten, and `save_adapter` will write them again.

    Args:
        directory: a folder with adapter_model.safetensors and adapter_config.json.
        adapter_dtype: of new layers, as in :class:`LoRALinear`.

    Returns:
        A report with the layers that carry the adapter.

    Everything is checked before `model` is touched; on an error it is as it was.

    Raises:
        AdapterFileError: a file is missing or malformed, uses a feature that is not supported, or
            belongs to another model; the message names the file and the problem.
        InvalidArgumentError: a PEFT model, or one whose adapter is merged.
    """
    refuse_peft(model, "its own load_adapter(directory, name)")
    check_dtype(adapter_dtype, "adapter_dtype")
    model = unwrap(model)
    folder = _folder(directory)
    config = adapter_config.parse(_read(folder / CONFIG), folder / CONFIG)
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise AdapterFileError(
            f"{folder}: has adapter_model.bin only; pickle files are not read, save it as "
            "safetensors with PEFT"
        )
    tensors, _ = safetensors_file.read_file(folder / WEIGHTS)
    matched = match(model, config, sort_tensors(tensors, folder / WEIGHTS), folder)
    backends = {n: backend_for(m.module, m.r) for n, m in matched.layers.items()}
    options: dict[nn.Module, dict[str, Any]] = {
        m.module: {
            "r": m.r, "alpha": m.alpha, "dropout": config.dropout, "rslora": config.rslora,
            "dora": config.dora, "adapter_dtype": adapter_dtype,
            **({"adapt": lstm_kinds(list(m.factors))} if isinstance(m.module, nn.LSTM) else {}),
        }
        for m in matched.layers.values()
        if not isinstance(m.module, ADAPTED)
    }  # fmt: skip
    made = install(model, options, matched.saved_modules) if options else {}
    for module in matched.saved_modules:
        module.saved_with_adapter = True  # type: ignore[assignment]
    _copy(matched, made, config.rslora)
    return Report([LayerReport(name, FUSED, "", backend) for name, backend in backends.items()])


@torch.no_grad()
def _copy(matched: Match, made: dict[nn.Module, nn.Module], rslora: bool) -> None:
    for entry in matched.layers.values():
        layer: Any = made.get(entry.module, entry.module)
        layer.alpha, layer.rslora = entry.alpha, rslora
        for parameter_name, tensor in entry.factors.items():
            getattr(layer, parameter_name).copy_(tensor)
    for target, tensor in matched.saved:
        target.copy_(tensor)


def _folder(directory: object) -> Path:
    if not isinstance(directory, (str, os.PathLike)) or "\0" in str(directory):
        raise InvalidArgumentError(f"directory={directory!r}; accepted: the path of a folder")
    return Path(directory)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read: {error.strerror or error}") from error
