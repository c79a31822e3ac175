"""Spectra of an adapter on disk, and their shares of the base weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lora_kernels.errors import AdapterFileError, ConfigError
from lora_kernels.modules.adapter_formats import read_adapter
from lora_kernels.modules.adapter_spectrum import (
    LayerSpectrum,
    layer_spectrum,
    match_weights,
    module_of,
    pairs,
)
from lora_kernels.training.references import model_path


@dataclass(frozen=True)
class Inspection:
    """What `lora-kernels inspect` shows; `unmatched` layers have no weight in the base's files."""

    adapter: str
    r: int
    alpha: float
    layers: list[LayerSpectrum]
    base: str | None
    unmatched: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "adapter": self.adapter,
            "base": self.base,
            "r": self.r,
            "alpha": self.alpha,
            "median_effective_rank": median(s.effective_rank for s in self.layers),
            "median_rank_at_90": median(s.rank_at_90 for s in self.layers),
            "unmatched": self.unmatched,
            "layers": [s.to_dict() for s in self.layers],
        }


def inspect_adapter(
    path: str | Path, base: str | None = None, alpha: float | None = None
) -> Inspection:
    """Looks into the adapter at `path`.

    Args:
        path: PEFT's folder, the folder of a run, or a loralib or torchtune file.
        base: reference of the base model (folder or ``package:``), for the share of each update.
        alpha: for files that do not hold it.

    Raises:
        AdapterFileError: no adapter there, or a layer with NaN or infinity.
        ConfigError: `base` holds no weights that can be read one by one.
    """
    path = Path(path)
    if (path / "adapter" / "adapter_config.json").is_file():
        path = path / "adapter"
    adapter, _ = read_adapter(path, alpha=alpha, strict=False)
    found = pairs(adapter.tensors)
    if not found:
        raise AdapterFileError(f"{path}: has no pair of lora_A and lora_B")
    norms: dict[str, float] = {}
    if base is not None:
        norms = {
            layer: torch.linalg.vector_norm(weight.double()).item()
            for layer, weight in _base_weights(base, list(found))
        }
        if not norms:
            raise ConfigError(
                f"base={base!r} has no weight of the adapter's layers, "
                f"such as {next(iter(found))!r}"
            )
    layers = []
    for layer, (a, b) in found.items():
        if not (a.isfinite().all() and b.isfinite().all()):
            raise AdapterFileError(f"{path}: layer {layer!r} holds NaN or infinity")
        scaling = adapter.scaling_of(module_of(layer), a.shape[0])
        layers.append(layer_spectrum(layer, a, b, scaling, norms.get(layer)))
    layers.sort(key=lambda s: _natural(s.layer))
    return Inspection(
        adapter=str(path),
        r=adapter.config["r"],
        alpha=adapter.config["lora_alpha"],
        layers=layers,
        base=base,
        unmatched=[s.layer for s in layers if s.share is None] if base else [],
    )


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which layer 10 follows layer 9."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]


def _base_weights(base: str, layers: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(layer, its weight), one at a time."""
    from safetensors import SafetensorError, safe_open

    folder = Path(model_path("base", base))
    if not folder.is_dir():
        raise ConfigError(f"base={base!r} is no folder on this machine; accepted: a model's folder")
    files = sorted(folder.glob("*.safetensors"))
    if files:
        for path in files:
            try:
                with safe_open(str(path), framework="pt") as file:
                    for name, layer in match_weights(layers, file.keys()).items():
                        yield layer, file.get_tensor(name)
            except (OSError, SafetensorError) as e:
                raise ConfigError(f"base={base!r}: {path.name} cannot be read: {e}") from None
        return
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if not pickled:
        raise ConfigError(f"base={base!r} holds no *.safetensors and no pytorch_model*.bin")
    for path in pickled:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for name, layer in match_weights(layers, state).items():
            yield layer, state[name]
