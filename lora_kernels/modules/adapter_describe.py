"""The configuration that describes a model's LoRALinear layers to PEFT."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection

from torch import nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.adapted_layer import AdaptedLayer
from lora_kernels.modules.adapter_config import AdapterConfig
from lora_kernels.modules.lora_linear import LoRALinear
from lora_kernels.modules.traversal import adapter_parameters, named_modules

_SHOWN = 4


def describe(
    model: nn.Module,
    layers: dict[str, LoRALinear | AdaptedLayer],
    saved: list[str],
    base_model_name_or_path: str | None,
    task_type: str | None,
) -> AdapterConfig:
    """Hyperparameters, and targets that select exactly `layers` among the model's modules.

    Raises:
        InvalidArgumentError: PEFT's configuration has no words for this model.
    """
    if "" in layers:
        raise InvalidArgumentError(
            "the model is itself an adapted layer; the format names layers inside a model"
        )
    doras = {layer.dora for layer in layers.values()}
    if len(doras) > 1:
        raise InvalidArgumentError(
            "some LoRALinear layers use DoRA and some do not; one adapter file holds one kind"
        )
    # Embeddings and LSTM have no dropout on the adapter's path (an LSTM's own is another thing).
    dropouts = Counter(
        layer.dropout for layer in layers.values() if not isinstance(layer, (nn.Embedding, nn.LSTM))
    ) or Counter([0.0])
    if len(dropouts) > 1:
        warnings.warn(
            f"the layers have dropout {sorted(dropouts)}; the file has room for one and gets "
            f"{dropouts.most_common(1)[0][0]}",
            stacklevel=3,
        )
    # One scaling rule per file: where layers differ, alpha is restated for alpha / r.
    rules = {layer.rslora for layer in layers.values()}
    alphas = {
        name: layer.alpha if len(rules) == 1 else layer.scaling * layer.r
        for name, layer in layers.items()
    }
    r = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    names = [name for name, _ in named_modules(model, duplicates=False)]
    config = AdapterConfig(
        r=r,
        alpha=alpha,
        dropout=dropouts.most_common(1)[0][0],
        rslora=rules == {True},
        dora=doras == {True},
        target_modules=_targets(names, list(layers), saved),
        modules_to_save=saved,
        rank_pattern={_exactly(n): layer.r for n, layer in layers.items() if layer.r != r},
        alpha_pattern={_exactly(n): a for n, a in alphas.items() if a != alpha},
        base_model_name_or_path=base_model_name_or_path,
        task_type=task_type,
    )
    _check_saved(config, names, layers, saved)
    return config


def _targets(names: list[str], adapted: list[str], saved: list[str]) -> str | list[str]:
    """Last name parts when they select `adapted` and nothing else, else names, else a pattern."""
    short = sorted({name.rpartition(".")[2] for name in adapted})
    for targets in (short, sorted(adapted)):
        config = AdapterConfig(r=1, alpha=1, target_modules=targets, modules_to_save=saved)
        if {name for name in names if config.is_target(name)} == set(adapted):
            return targets
    return "|".join(re.escape(name) for name in sorted(adapted))


def _exactly(name: str) -> str:
    """A pattern for this layer and for none that ends like it."""
    return f"^{re.escape(name)}"


def _check_saved(
    config: AdapterConfig, names: list[str], layers: Collection[str], saved: list[str]
) -> None:
    """PEFT finds modules_to_save by textual endings, which may say more than is meant."""
    more = [name for name in names if config.is_saved(name) and name not in saved]
    if more:
        raise InvalidArgumentError(
            f"modules_to_save={saved} would also mean {more[0]!r} to PEFT; rename the module"
        )
    lost = [name for name in layers if config.is_target(name) is False]
    if lost:
        raise InvalidArgumentError(
            f"modules_to_save={saved} would hide the adapted layer {lost[0]!r} from PEFT; "
            "rename the module"
        )


def warn_about_unsaved(model: nn.Module, saved: dict[str, nn.Module]) -> None:
    """Warn about trainable parameters that the adapter files will not hold."""
    held = {id(p) for module in saved.values() for p in module.parameters()}
    for module in model.modules():
        held |= {id(p) for p in adapter_parameters(module)}
    lost = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if lost:
        shown = ", ".join(lost[:_SHOWN]) + (", ..." if len(lost) > _SHOWN else "")
        warnings.warn(
            f"{len(lost)} trainable parameters are not in the adapter and are not saved: {shown}; "
            "name their modules in modules_to_save",
            stacklevel=3,
        )
