"""Methods lora and dora: PEFT makes the adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lora_kernels.errors import AdapterFileError, ConfigError
from lora_kernels.training.config import Config
from lora_kernels.training.loading import Base, first_line
from lora_kernels.training.methods.module_names import (
    check_rank,
    check_targets,
    fresh_modules,
    head_names,
)
from lora_kernels.training.tasks import Task

_HEADS_KNOWN = ("SEQ_CLS", "TOKEN_CLS")
NEEDED_FILES = ("adapter_config.json", "adapter_model.safetensors")


def prepare(base: Base, task: Task, config: Config) -> Any:
    """A PEFT model. Adapter and head are fp32, as small optimizer steps are lost in bf16, unless
    the precision is ``bf16-weights``.

    Raises:
        ConfigError: targets match nothing, or the rank is larger than a layer.
    """
    import peft

    lora, model = config.lora, base.model
    check_targets(model, lora.targets)
    for name in lora.modules_to_save:
        check_targets(model, [name], "lora.modules_to_save")
    new = fresh_modules(model, base.fresh)
    # Where PEFT knows the task it saves the head by itself.
    heads = [] if task.peft_task in _HEADS_KNOWN else head_names(model)
    saved = list(dict.fromkeys([*lora.modules_to_save, *new, *heads]))
    adapter = peft.LoraConfig(
        task_type=task.peft_task,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=config.method == "dora",
        target_modules=lora.targets,
        exclude_modules=[*lora.exclude, *saved, *head_names(model)] or None,
        modules_to_save=saved or None,
    )
    wide = config.precision != "bf16-weights"
    try:
        with warnings.catch_warnings():
            # PEFT warns about names in exclude_modules that matched nothing by themselves.
            warnings.filterwarnings("ignore", message=".*exclude_modules.*")
            model = peft.get_peft_model(model, adapter, autocast_adapter_dtype=wide)
    except ValueError as e:
        raise ConfigError(f"lora.targets={lora.targets!r}: {first_line(e)}") from None
    check_rank(model, lora.r)
    if wide:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    _keep_activations_narrow(model)
    return model


def _keep_activations_narrow(model: Any) -> None:
    """An embedding that trains in fp32 passes on the dtype of the frozen one: autocast leaves
    lookups alone, and the norm behind it would meet an input wider than its weights.
    """
    from peft.utils import ModulesToSaveWrapper
    from torch import nn

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and isinstance(
            module.original_module, nn.Embedding
        ):
            module.register_forward_hook(_to_frozen_dtype)


def _to_frozen_dtype(module: Any, inputs: Any, output: Any) -> Any:
    return output.to(module.original_module.weight.dtype)


def save(model: Any, folder: Path) -> None:
    """PEFT's format."""
    model.save_pretrained(str(folder))


def attach(base: Base, folder: Path, saved: dict[str, Any]) -> Any:
    """PEFT only warns about parts that a file lacks; here that is an error.

    Raises:
        AdapterFileError: the file is damaged or belongs to another model.
    """
    import peft
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            model = peft.PeftModel.from_pretrained(base.model, str(folder))
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, UserWarning) as e:
        reason = " ".join(str(e).split())[:200]
        raise AdapterFileError(
            f"{folder} is damaged or belongs to another model: {reason}"
        ) from None
    _keep_activations_narrow(model)
    return model
