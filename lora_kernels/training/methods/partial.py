"""Methods freeze and bitfit: some of the model's own parameters train, the rest is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kernels.errors import AdapterFileError, ConfigError
from lora_kernels.training.config import Config
from lora_kernels.training.loading import Base
from lora_kernels.training.methods.module_names import (
    check_targets,
    ends_with,
    fresh_modules,
    head_names,
    layer_list,
    under,
)
from lora_kernels.training.methods.wide_parameters import even_norms, pass_on, widen_trained
from lora_kernels.training.tasks import Task

FILE = "trained.safetensors"
NEEDED_FILES = (FILE,)


def prepare(base: Base, task: Task, config: Config) -> Any:
    """Freezes everything but the chosen parameters, the head and what no file gave.

    bitfit: Ben Zaken et al., BitFit (2022): the biases.

    Raises:
        ConfigError: nothing is left to train, or names that match nothing.
    """
    model = base.model
    always = [*head_names(model), *fresh_modules(model, base.fresh)]
    if config.method == "bitfit":
        chosen = [name for name, _ in model.named_parameters() if ends_with(name, "bias")]
        if not chosen:
            raise ConfigError("method=bitfit: the model has no biases; accepted: lora, freeze, ...")
        train = set(chosen)
    else:
        train = _unfrozen(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in train or under(name, always))
    if config.precision != "bf16-weights":
        widen_trained(model)
    if config.train.checkpointing:
        # Frozen embeddings give inputs without gradients, which a recomputed layer would not pass.
        model.enable_input_require_grads()
    return model


def _unfrozen(model: Any, config: Config) -> set[str]:
    freeze = config.freeze
    names = [name for name, _ in model.named_parameters()]
    if freeze.modules:
        check_targets(model, freeze.modules, "freeze.modules")
        modules = [
            name for name, _ in model.named_modules()
            if any(ends_with(name, wanted) for wanted in freeze.modules)
        ]  # fmt: skip
    else:
        stack, layers = layer_list(model)
        if freeze.layers > len(layers):
            raise ConfigError(
                f"freeze.layers={freeze.layers} is out of range; accepted: 1 to {len(layers)}, the "
                f"layers in {stack}"
            )
        modules = [f"{stack}.{i}" for i in range(len(layers) - freeze.layers, len(layers))]
    inside = tuple(module + "." for module in modules)
    return {name for name in names if name.startswith(inside)}


def save(model: Any, folder: Path) -> None:
    """The parameters that trained, under the base model's names, as safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    trained = {
        name: p.detach().cpu().contiguous().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    save_file(trained, str(folder / FILE), metadata={"format": "pt"})


def attach(base: Base, folder: Path, saved: dict[str, Any]) -> Any:
    """Puts the trained parameters in their places.

    Raises:
        AdapterFileError: the file is damaged or belongs to another model.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        trained = load_file(str(folder / FILE))
    except (SafetensorError, OSError) as e:
        raise AdapterFileError(f"{folder / FILE} is damaged: {e}") from None
    parameters = dict(base.model.named_parameters())
    for name, value in trained.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise AdapterFileError(f"{folder / FILE} belongs to another model: {name}")
        if value.dtype != parameters[name].dtype:
            pass_on(base.model.get_submodule(name.rpartition(".")[0]), parameters[name].dtype)
        with torch.no_grad():
            parameters[name].data = value.to(parameters[name].device)
    even_norms(base.model)
    return base.model
