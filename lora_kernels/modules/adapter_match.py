"""Does an adapter belong to this model: every check that comes before the first write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, nn

from lora_kernels.errors import AdapterFileError, InvalidArgumentError
from lora_kernels.modules.adapter_config import AdapterConfig
from lora_kernels.modules.adapter_tensors import AdapterTensors
from lora_kernels.modules.eligibility import weight_shape
from lora_kernels.modules.layer_types import ADAPTED, factor_shapes, is_other_kind, obstacle
from lora_kernels.modules.lora_linear import LoRALinear
from lora_kernels.modules.traversal import (
    adapter_parameters,
    lora_layers,
    named_modules,
    tied_outside,
)


@dataclass(frozen=True)
class LayerMatch:
    """One layer of the model and what the file has for it."""

    module: nn.Module
    r: int
    alpha: float
    factors: dict[str, Tensor]


@dataclass
class Match:
    """All that is to be written: adapters, and (destination, source) of modules saved whole."""

    layers: dict[str, LayerMatch] = field(default_factory=dict)
    saved: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    saved_modules: list[nn.Module] = field(default_factory=list)


def match(model: nn.Module, config: AdapterConfig, tensors: AdapterTensors, path: object) -> Match:
    """Pair the tensors of a file with the layers of `model`; nothing is changed.

    Raises:
        AdapterFileError: the file has a layer that the model or the configuration lacks, or the
            other way round, or shapes differ.
        InvalidArgumentError: a layer is merged.
    """
    found = Match()
    modules = dict(named_modules(model))
    if not tensors.layers:
        _reject(path, "the file has no lora_A and lora_B")
    for name, factors in tensors.layers.items():
        if name not in modules:
            _reject(path, f"the model has no layer {name!r}; the adapter is for another model")
        if config.is_target(name) is False:
            _reject(path, f"the file has layer {name!r}, which adapter_config.json does not target")
        found.layers[name] = _match_layer(name, modules[name], config, factors, path)
    _check_shared(found, path)
    adapted = {id(entry.module) for entry in found.layers.values()}
    for name, layer in lora_layers(model).items():
        if id(layer) not in adapted:
            kind = type(layer).__name__
            _reject(path, f"the file has nothing for the model's {kind} {name!r}")
    for name, module in named_modules(model, duplicates=False):
        able = isinstance(module, nn.Linear) or is_other_kind(module)
        if able and id(module) not in adapted and config.is_target(name):
            _reject(
                path, f"the file has nothing for layer {name!r}, which its configuration targets"
            )
    _match_saved(model, config, tensors.saved, found, path)
    return found


def _match_layer(
    name: str, module: nn.Module, config: AdapterConfig, factors: dict[str, Tensor], path: object
) -> LayerMatch:
    if not isinstance(module, ADAPTED):
        reason = obstacle(module)
        if reason:
            _reject(path, f"layer {name!r} of the model cannot carry the adapter: {reason}")
        if not name:
            _reject(path, "the adapter is for a model that is itself a linear layer")
    elif module.merged:
        raise InvalidArgumentError(
            f"layer {name!r} is merged; call lora_kernels.unmerge(model) first"
        )
    for parameter in (*module.parameters(recurse=False), *adapter_parameters(module)):
        if parameter.is_meta or type(parameter.data) is not Tensor:
            kind = "on the meta device" if parameter.is_meta else "sharded"
            _reject(path, f"layer {name!r} of the model is {kind}; load before that or after")
    if not isinstance(module, nn.Linear):
        return _match_other(name, module, config, factors, path)
    if "lora_A" not in factors or factors["lora_A"].dim() != 2:
        _reject(path, f"layer {name!r} of the file is not a linear layer's; the model's is one")
    r, k, n = factors["lora_A"].shape[0], factors["lora_A"].shape[1], factors["lora_B"].shape[0]
    out_features, in_features = weight_shape(module)
    if (n, k) != (out_features, in_features):
        _reject(
            path,
            f"layer {name!r} of the file maps {k} to {n} features, the model's "
            f"{in_features} to {out_features}; it is for another model",
        )
    if r != config.rank_of(name):
        _reject(
            path,
            f"layer {name!r} has rank {r}, adapter_config.json says {config.rank_of(name)}",
        )
    if config.dora != ("lora_magnitude_vector" in factors):
        has = "no" if config.dora else "a"
        _reject(path, f"layer {name!r} has {has} lora_magnitude_vector, but use_dora={config.dora}")
    if isinstance(module, LoRALinear) and (r, config.dora) != (module.r, module.dora):
        _reject(
            path,
            f"layer {name!r} of the file has r={r}, dora={config.dora}; the model's LoRALinear "
            f"has r={module.r}, dora={module.dora}",
        )
    return LayerMatch(module, r, config.alpha_of(name), factors)


def _match_other(
    name: str, module: nn.Module, config: AdapterConfig, factors: dict[str, Tensor], path: object
) -> LayerMatch:
    """A layer of another kind than nn.Linear: the same factors in the same shapes."""
    if config.dora:
        _reject(path, f"layer {name!r} is a {type(module).__name__}; DoRA is for linear layers")
    r = config.rank_of(name)
    wanted = factor_shapes(module, r, list(factors))
    found = {key: tuple(tensor.shape) for key, tensor in factors.items()}
    if wanted != found:
        for key in sorted(wanted.keys() | found.keys()):
            if wanted.get(key) != found.get(key):
                has = f"{list(found[key])}" if key in found else "nothing"
                needs = f"{list(wanted[key])}" if key in wanted else "nothing"
                _reject(
                    path,
                    f"layer {name!r}, {key}: the file has {has}, the model's "
                    f"{type(module).__name__} with r={r} needs {needs}; it is for another model",
                )
    if isinstance(module, ADAPTED) and module.r != r:
        _reject(path, f"layer {name!r} of the file has r={r}, the model's has r={module.r}")
    return LayerMatch(module, r, config.alpha_of(name), factors)


def _check_shared(found: Match, path: object) -> None:
    """A layer that the model reaches under two names may come twice, with one content."""
    first: dict[int, tuple[str, LayerMatch]] = {}
    for name, entry in found.layers.items():
        other_name, other = first.setdefault(id(entry.module), (name, entry))
        same = all(torch.equal(entry.factors[k], other.factors[k]) for k in entry.factors)
        if not same or entry.alpha != other.alpha:
            _reject(path, f"{other_name!r} and {name!r} are one layer of the model, but differ")


def _match_saved(
    model: nn.Module, config: AdapterConfig, saved: dict[str, Tensor], found: Match, path: object
) -> None:
    """Tensors of modules saved whole: each has its place, and each module all its tensors."""
    left = dict(saved)
    sources: dict[int, Tensor] = {}
    for name, module in named_modules(model, duplicates=False):
        if not name or not config.is_saved(name):
            continue
        found.saved_modules.append(module)
        for key, destination in module.state_dict(keep_vars=True).items():
            full = f"{name}.{key}"
            if full not in saved:
                _reject(path, f"the file has no {full!r}, a part of modules_to_save")
            source = left.pop(full)
            _check_saved(full, source, destination, path)
            if not torch.equal(sources.setdefault(id(destination), source), source):
                _reject(
                    path, f"{full!r} is tied to another tensor in the model, but not in the file"
                )
            found.saved.append((destination, source))
    if left:
        name = next(iter(left))
        _reject(path, f"tensor {name!r} is neither an adapter's nor in a module of modules_to_save")
    tied = tied_outside(model, found.saved_modules)
    if tied:
        _reject(
            path, f"modules_to_save: {tied[0]!r} is tied to {tied[1]!r} in the model; untie them"
        )


def _check_saved(name: str, source: Tensor, destination: object, path: object) -> None:
    if not isinstance(destination, Tensor) or type(destination.data) is not Tensor:
        _reject(
            path, f"{name!r} is a {type(destination).__name__} in the model, not a plain tensor"
        )
    if destination.is_meta:
        _reject(path, f"{name!r} of the model is on the meta device")
    if source.shape != destination.shape:
        _reject(
            path,
            f"{name!r} has shape {list(source.shape)}, the model's {list(destination.shape)}; "
            "it is for another model",
        )
    if source.is_floating_point() != destination.is_floating_point():
        _reject(path, f"{name!r} is {source.dtype}, the model's {destination.dtype}")


def _reject(path: object, problem: str) -> NoReturn:
    raise AdapterFileError(f"{path}: {problem}")
