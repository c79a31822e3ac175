"""An adapter folded into its base model, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels.errors import AdapterFileError, ConfigError
from lora_kernels.modules import safetensors_file
from lora_kernels.modules.atomic_write import write_files
from lora_kernels.training.adapted_model import (
    adapter_source,
    base_path,
    load_adapted,
    load_tokenizer,
)
from lora_kernels.training.preflight import check_room


def merge_to_disk(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    weights_only: bool = False,
) -> dict[str, Any]:
    """Writes the base model with the adapter folded into its weights.

    A base whose files are quantized is written dense: the adapter was trained over the values that
    the codes stand for, and quantizing the sum again would lose small updates.

    Args:
        adapter: folder in PEFT's format, or the folder of a run.
        output: new folder for a model that ``from_pretrained`` loads, with its tokenizer; with
            `weights_only` a new ``.safetensors`` file of the changed weights alone.
        base: reference of the base model; None takes what the adapter names.
        dtype: of the written weights; None keeps that of the base.

    Returns:
        ``{"output", "base", "layers", "bytes"}``.

    Raises:
        AdapterFileError: no adapter, one for another model, or a result with NaN or infinity.
        ConfigError: the base cannot be loaded, or `output` exists or cannot be written.
    """
    output = Path(output)
    if weights_only and output.suffix != ".safetensors":
        raise ConfigError(
            f"output={str(output)!r}: accepted with --weights-only: a .safetensors file"
        )
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise ConfigError(f"output={str(output)!r} exists; choose another name or remove it")
    source = adapter_source(adapter, base)
    check_room("output", output.parent, 0)
    model = load_adapted(source, dtype, dense=True)
    changed = _changed_weights(model)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as e:
        raise AdapterFileError(f"{source.folder}: {str(e).splitlines()[0]}") from None
    tensors = merged.state_dict()
    if weights_only:
        tensors = {name: tensors[name] for name in changed}
    size = sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors.values()}.values())
    check_room("output", output.parent, size)
    try:
        if weights_only:
            output.parent.mkdir(parents=True, exist_ok=True)
            plain = {name: t.contiguous() for name, t in tensors.items()}
            write_files(
                output.parent,
                {output.name: lambda f: safetensors_file.write(f, plain, {"format": "pt"})},
            )
        else:
            _write_model(output, merged, source.base)
    except OSError as e:
        reason = e.strerror or e
        raise ConfigError(f"output={str(output)!r} cannot be written: {reason}") from None
    return {"output": str(output), "base": source.base, "layers": len(changed), "bytes": size}


def _changed_weights(model: Any) -> list[str]:
    """Names in the merged model of what differs from the base: adapted weights, saved modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    names = []
    inner: nn.Module = model.get_base_model()
    for name, module in inner.named_modules():
        if isinstance(module, BaseTunerLayer):
            names.append(f"{name}.weight")
        elif isinstance(module, ModulesToSaveWrapper):
            state = module.original_module.state_dict()
            names += [f"{name}.{key}" for key in state]
    return names


def _write_model(output: Path, model: Any, base: str) -> None:
    from lora_kernels.training.atomic import staged_folder

    with staged_folder(output) as stage, torch.no_grad():
        model.save_pretrained(str(stage))
        try:
            tokenizer = load_tokenizer(base_path(base))
        except ConfigError:
            return  # a model of images or sound
        tokenizer.save_pretrained(str(stage))
