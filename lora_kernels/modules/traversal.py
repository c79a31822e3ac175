"""Finding layers in a model, under the names that PEFT and state dicts use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.adapted_layer import AdaptedLayer
from lora_kernels.modules.lora_linear import LoRALinear

# Attributes through which wrappers hold the wrapped module; not part of a layer's name.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel."""
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(f"model is a {type(model).__name__}; accepted: torch.nn.Module")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


def named_modules(model: nn.Module, duplicates: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """(name without wrappers, module); a module that is reached twice comes twice."""
    for name, module in model.named_modules(remove_duplicate=not duplicates):
        yield ".".join(part for part in name.split(".") if part not in _WRAPPERS), module


def lora_layers(model: nn.Module) -> dict[str, LoRALinear | AdaptedLayer]:
    """Every LoRALinear and every other adapted layer once, under its first name."""
    found = named_modules(unwrap(model), duplicates=False)
    kinds = (LoRALinear, AdaptedLayer)
    return {name: module for name, module in found if isinstance(module, kinds)}


def require_lora_layers(model: nn.Module, instead: str) -> dict[str, LoRALinear | AdaptedLayer]:
    """:func:`lora_layers`, or an error when there is none or the model is PEFT's."""
    refuse_peft(model, instead)
    layers = lora_layers(model)
    if not layers:
        raise InvalidArgumentError(
            "the model has no LoRALinear layer; call lora_kernels.replace_modules(model) first"
        )
    return layers


def refuse_peft(model: nn.Module, instead: str) -> None:
    """Raise for a model that PEFT has wrapped, naming what to call `instead`."""
    for module in unwrap(model).modules():
        if any(base.__module__.split(".")[0] == "peft" for base in type(module).__mro__):
            raise InvalidArgumentError(f"the model has PEFT layers; use {instead}")


def adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters of an adapted layer; none for another module."""
    if isinstance(module, AdaptedLayer):
        return list(module.factors().values())
    if not isinstance(module, LoRALinear):
        return []
    candidates = (module.lora_A, module.lora_B, module.lora_magnitude_vector)
    return [p for p in candidates if p is not None]


class Owner(NamedTuple):
    """One place in a model that holds a parameter or buffer."""

    name: str
    module: nn.Module


def memory(tensor: Tensor) -> object:
    """Equal for tensors that are one: same first byte, same number of elements."""
    if type(tensor.data) is not Tensor or tensor.is_meta:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.numel()


def tensor_owners(model: nn.Module) -> dict[object, list[Owner]]:
    """:func:`memory` of every parameter and buffer -> the modules that hold it."""
    owners: dict[object, list[Owner]] = {}
    for prefix, module in named_modules(model, duplicates=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.numel() > 0:
                full = f"{prefix}.{name}" if prefix else name
                owners.setdefault(memory(tensor), []).append(Owner(full, module))
    return owners


def tied_outside(model: nn.Module, inside: Sequence[nn.Module]) -> tuple[str, str] | None:
    """(name inside, name outside) of a tensor that `inside` shares with the rest of the model."""
    members = {id(m) for module in inside for m in module.modules()}
    for owners in tensor_owners(model).values():
        within = [o.name for o in owners if id(o.module) in members]
        outside = [o.name for o in owners if id(o.module) not in members]
        if within and outside:
            return within[0], outside[0]
    return None
