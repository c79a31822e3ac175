"""An adapter in memory, under PEFT's names, and what a configuration is made from."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor

from lora_kernels.errors import AdapterFileError
from lora_kernels.modules.adapter_config import AdapterConfig
from lora_kernels.modules.adapter_tensors import PREFIX

A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


@dataclass(frozen=True)
class Heads:
    """Attention heads of the base model: query heads, key heads, width of one."""

    query: int
    key: int
    width: int


@dataclass
class Adapter:
    """PEFT's tensors and PEFT's configuration; `notes` are lines for the user."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def layers(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(layer, its tensors by suffix) of every adapted linear layer, in the file's order."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            for suffix in (A, B, MAGNITUDE):
                if key.startswith(PREFIX) and key.endswith(suffix):
                    layer = key.removeprefix(PREFIX).removesuffix(suffix)
                    found.setdefault(layer, {})[suffix] = tensor
        yield from found.items()

    def others(self) -> dict[str, Tensor]:
        """Tensors of modules that were saved whole, without the prefix."""
        return {
            key.removeprefix(PREFIX): tensor
            for key, tensor in self.tensors.items()
            if not key.endswith((A, B, MAGNITUDE))
        }

    def rule(self) -> AdapterConfig:
        """Rank and alpha per layer, as the configuration says."""
        c = self.config
        return AdapterConfig(
            r=c["r"],
            alpha=c["lora_alpha"],
            rslora=bool(c.get("use_rslora")),
            rank_pattern=c.get("rank_pattern") or {},
            alpha_pattern=c.get("alpha_pattern") or {},
        )

    def scaling_of(self, layer: str, r: int) -> float:
        rule = self.rule()
        return rule.alpha_of(layer) / (math.sqrt(r) if rule.rslora else r)


def reject(path: object, problem: str) -> NoReturn:
    raise AdapterFileError(f"{path}: {problem}")


def check_pairs(adapter: Adapter, path: object) -> None:
    """Every layer has both factors, and they fit each other.

    Raises:
        AdapterFileError: names the layer.
    """
    count = 0
    for layer, factors in adapter.layers():
        count += 1
        missing = [s for s in (A, B) if s not in factors]
        if missing:
            reject(path, f"layer {layer!r} has no {missing[0].split('.')[1]}")
        a, b = factors[A], factors[B]
        if a.dim() < 2 or b.dim() < 2 or a.shape[0] != b.shape[1]:
            reject(path, f"layer {layer!r} has lora_A {list(a.shape)} and lora_B {list(b.shape)}")
    if not count:
        reject(path, "it has no pair of lora_A and lora_B")


def make_config(
    layers: Mapping[str, tuple[int, float]], saved: Iterable[str], dora: bool, base: str | None
) -> dict[str, Any]:
    """PEFT's configuration for layers with (rank, alpha); the layers are named one by one."""
    r = Counter(rank for rank, _ in layers.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in layers.values()).most_common(1)[0][0]
    config = AdapterConfig(
        r=r,
        alpha=alpha,
        dora=dora,
        target_modules=sorted(layers),
        modules_to_save=sorted(saved),
        rank_pattern={f"^{n}": k for n, (k, _) in layers.items() if k != r},
        alpha_pattern={f"^{n}": a for n, (_, a) in layers.items() if a != alpha},
        base_model_name_or_path=base,
    )
    content: dict[str, Any] = json.loads(config.to_json())
    return content


def saved_modules(others: Iterable[str], layers: Iterable[str]) -> list[str]:
    """Names for modules_to_save: the topmost part of each tensor's name that holds no adapter."""
    found = set()
    adapted = [f"{layer}." for layer in layers]
    for key in others:
        parts = key.split(".")[:-1]
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if not any(layer.startswith(f"{name}.") for layer in adapted):
                found.add(name)
                break
    return sorted(found)
