"""Which modules of a model names stand for, and what to say where they stand for none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lora_kernels.errors import ConfigError

# Modules that give the answer of a task. They are new for every task, so every method trains them.
HEADS = ("classifier", "score", "qa_outputs")
_SHOWN = 12


def ends_with(name: str, ending: str) -> bool:
    """Whether `ending` is the whole name or its last parts."""
    return name == ending or name.endswith("." + ending)


def under(name: str, parents: Iterable[str]) -> bool:
    """Whether `name` is one of `parents` or inside one, by the names' parts anywhere in it."""
    return any(f".{p}." in f".{name}." for p in parents)


def linear_names(model: Any) -> list[str]:
    """Last parts of the names of layers that can carry an adapter, in the model's order."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Embedding, Conv1D, nn.Conv1d, nn.Conv2d)
    found = [name for name, m in model.named_modules() if isinstance(m, kinds)]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in found))


def check_targets(model: Any, targets: str | list[str], key: str = "lora.targets") -> None:
    """Refuses a name or expression that matches no module.

    Raises:
        ConfigError: listing what would match.
    """
    if isinstance(targets, str) and targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        try:
            missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
        except re.error as e:
            raise ConfigError(f"{key}={targets!r} is no regular expression: {e}") from None
    else:
        missing = [t for t in targets if not any(ends_with(name, t) for name in names)]
    if missing or not targets:
        raise ConfigError(
            f"{key}={missing[0] if missing else targets!r} matches no module of the model; "
            f"accepted: all-linear, or names such as {listed(linear_names(model))}"
        )


def check_rank(model: Any, r: int) -> None:
    """Refuses an adapter of more rank than its layer can have.

    Raises:
        ConfigError: naming the layer.
    """
    for name, module in model.named_modules():
        sizes = [
            size
            for key in ("in_features", "out_features")
            if hasattr(module, "lora_A") and isinstance(size := getattr(module, key, None), int)
        ]
        if sizes and min(sizes) < r:
            raise ConfigError(
                f"lora.r={r} is larger than the layer {name.removeprefix('base_model.model.')} "
                f"({sizes[-1]} x {sizes[0]}); accepted: at most {min(sizes)}, or lora.exclude="
                f"{name.rpartition('.')[2]}"
            )


def fresh_modules(model: Any, fresh: Sequence[str]) -> list[str]:
    """Modules whose parameters no file gave, without those that the head of a task covers.

    Raises:
        ConfigError: such a parameter belongs to no module that can be saved, and is random.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    found: dict[str, None] = {}
    for name in fresh:
        parent = name.rpartition(".")[0]
        if under(parent, HEADS) or name not in parameters:
            continue
        if any(True for _ in modules[parent].children()):
            if parameters[name].unique().numel() > 1:
                raise ConfigError(
                    f"model: {name} is not in the model's file and would be random; accepted: a "
                    "model that was saved with it"
                )
            continue
        found[parent] = None
    return list(found)


def head_names(model: Any) -> list[str]:
    """The heads of tasks that this model has."""
    tops = {name for name, _ in model.named_modules()}
    return [name for name in HEADS if name in tops]


def layer_list(model: Any) -> tuple[str, nn.ModuleList]:
    """The stack of layers; of an encoder and a decoder the decoder's.

    Raises:
        ConfigError: the model has no stack of equal layers.
    """
    stacks = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len({type(layer) for layer in m}) == 1
    ]
    # Inside a layer there are lists too (experts, sub-layers); the stack is outermost.
    outer = [s for s in stacks if not any(s[0].startswith(o + ".") for o, _ in stacks)]
    if not outer:
        raise ConfigError(
            "method=freeze: the model has no stack of layers; give freeze.modules, names such as "
            + listed(linear_names(model))
        )
    longest = max(len(m) for _, m in outer)
    decoders = [s for s in outer if "decoder" in s[0]]
    return decoders[-1] if decoders else next(s for s in outer if len(s[1]) == longest)


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
