"""Quantized checkpoints as dictionaries: bitsandbytes, GPTQ, AWQ and fp8, on torch alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lora_kernels.errors import AdapterFileError, InvalidArgumentError, QuantizedWeightError
from lora_kernels.modules import safetensors_file
from lora_kernels.modules.atomic_write import write_files
from lora_kernels.modules.quant_hints import hints_from_config, read_dtype
from lora_kernels.ops.quant_linear import (
    Hints,
    QuantTensor,
    Reader,
    quantized_layers,
    read_layer,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
_MAX_JSON = 100_000_000


def load_quantized(
    path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> dict[str, QuantTensor | Tensor]:
    """Every tensor of a checkpoint, the quantized weights assembled from their parts.

    Args:
        path: a safetensors file, or a folder with ``model.safetensors``, with
            ``model.safetensors.index.json`` and its shards, or with any safetensors files. The
            ``quantization_config`` of a ``config.json`` beside them is honoured: GPTQ needs it to
            know its version (without one, a checkpoint that is not symmetric is refused).
        device: where the tensors go.

    Returns:
        Name -> :class:`QuantTensor` for each quantized layer, under ``<layer>.weight``, and the
        plain tensor for everything else (biases, norms, embeddings).

    bitsandbytes 4-bit and 8-bit, GPTQ and AWQ of 4 bits, and fp8 (e4m3fn) are read; none of these
    packages is needed. Headers, JSON and shapes are checked before anything of their size is made.

    Raises:
        QuantizedWeightError: not there, not safetensors, truncated, or inconsistent; one line that
            names the file or the key.
    """
    path = Path(path)
    tensors = _read_folder(path) if path.is_dir() else _read_file(path)
    folder = path if path.is_dir() else path.parent
    return {name: t.to(device) for name, t in assemble(tensors, _hints(folder / CONFIG)).items()}


def save_quantized(
    tensors: Mapping[str, QuantTensor | Tensor], path: str | os.PathLike[str]
) -> None:
    """Write what :func:`load_quantized` gives into one safetensors file, whole or not at all.

    nf4, fp4 and int8 weights get the keys of bitsandbytes, int4 those of GPTQ or AWQ.

    Raises:
        InvalidArgumentError: a QuantTensor under a name that does not end in ``weight``.
        QuantizedWeightError: the file cannot be written.
    """
    flat: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if not isinstance(t, QuantTensor):
            flat[name] = t
            continue
        if name != "weight" and not name.endswith(".weight"):
            raise InvalidArgumentError(f"{name!r} is a QuantTensor; its name must end in .weight")
        flat |= t.state_dict(name.removesuffix("weight"))
    path = Path(path)
    metadata = {"format": "pt"}
    try:
        write_files(path.parent, {path.name: lambda f: safetensors_file.write(f, flat, metadata)})
    except OSError as error:
        raise QuantizedWeightError(f"{path}: cannot be written: {error.strerror}") from error


def assemble(
    tensors: Mapping[str, Tensor], hints: Hints | None = None
) -> dict[str, QuantTensor | Tensor]:
    """A state dict with each quantized weight in place of its parts.

    Raises:
        QuantizedWeightError: as :func:`load_quantized`.
    """
    made: dict[str, QuantTensor] = {}
    used: set[str] = set()
    for prefix, kind in quantized_layers(tensors).items():
        reader = Reader(tensors, prefix)
        made[f"{prefix}weight"] = read_layer(reader, kind, hints or Hints())
        used |= reader.used
    left = {name: t for name, t in tensors.items() if name not in used}
    return {**left, **made}


def _fail(path: object, problem: str) -> NoReturn:
    raise QuantizedWeightError(f"{path}: {problem}")


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf"):
        hint = (
            "load GGUF with transformers (gguf_file=) and quantize the model then"
            if path.suffix == ".gguf"
            else "pickles run code; convert it to safetensors"
        )
        _fail(path, f"is not a safetensors file; {hint}")
    try:
        return safetensors_file.read_file(path)[0]
    except AdapterFileError as error:
        raise QuantizedWeightError(str(error)) from error


def _read_folder(folder: Path) -> dict[str, Tensor]:
    if (folder / INDEX).exists():
        return _read_shards(folder)
    if (folder / SINGLE).exists():
        return _read_file(folder / SINGLE)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        _fail(folder, f"has no safetensors file; accepted: {SINGLE}, {INDEX}, or *.safetensors")
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = _read_file(file)
        twice = sorted(set(found) & set(tensors))
        if twice:
            _fail(file, f"has {twice[0]!r}, which another file of the folder has, too")
        tensors |= found
    return tensors


def _read_shards(folder: Path) -> dict[str, Tensor]:
    index = _read_json(folder / INDEX)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        _fail(folder / INDEX, "has no 'weight_map' of names to files")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            _fail(folder / INDEX, f"names the file {shard!r}; accepted: names without a folder")
        found = _read_file(folder / shard)
        wanted = {name for name, file in shards.items() if file == shard}
        missing = sorted(wanted - set(found))
        if missing:
            _fail(folder / shard, f"lacks {missing[0]!r}, which {INDEX} says it has")
        tensors |= {name: found[name] for name in wanted}
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            _fail(path, f"is larger than {_MAX_JSON} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        _fail(path, f"cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        _fail(path, f"is not JSON: {str(error).splitlines()[0]}")
    if not isinstance(value, dict):
        _fail(path, f"is a JSON {type(value).__name__}; accepted: an object")
    return value


def _hints(path: Path) -> Hints:
    if not path.exists():
        return Hints()
    config = _read_json(path)
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        _fail(path, "has a quantization_config that is not an object")
    return hints_from_config(
        quantization, read_dtype(config.get("dtype", config.get("torch_dtype")))
    )
