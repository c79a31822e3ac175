"""What an adapter learnt, layer by layer: singular values of its update s B A, and how many count.

The update is never formed. With thin QR factorisations B = Q_b R_b and A^T = Q_a R_a it is
Q_b (s R_b R_a^T) Q_a^T, so its singular values are those of the r x r matrix in the middle; all in
fp64. Convolutions count as the matrix [out, in * kernel], embeddings as [dim, entries].

    effective rank   exp(H) with H the entropy of sigma / sum(sigma); Roy and Vetterli, "The
                     effective rank: a measure of effective dimensionality", EUSIPCO 2007
    rank at 90 %     how many singular values hold 90 % of the energy sum(sigma^2)
    share            the update's Frobenius norm over that of W
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels.modules.adapter_tensors import PREFIX

ENERGY = 0.9
# Singular values below this part of the largest are rounding, not signal.
_NOISE = 1e-12
# Endings of A and B in PEFT's files: linear and convolution, embedding.
_MARKS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer; `singular_values` in falling order, `share` None without the base weights."""

    layer: str
    r: int
    scaling: float
    singular_values: list[float]
    effective_rank: float
    rank_at_90: int
    norm: float
    share: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def singular_values(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The min(r, N, K) largest singular values of scaling * B A, fp64, falling.

    Args:
        a: ``[r, K]`` or ``[r, ...]``, flattened after its first axis.
        b: ``[N, r]`` or ``[N, r, 1, ...]``.
    """
    a, b = a.double().flatten(1), b.double().flatten(1)
    r_a = torch.linalg.qr(a.t(), mode="r").R
    r_b = torch.linalg.qr(b, mode="r").R
    return torch.linalg.svdvals(scaling * (r_b @ r_a.t()))


def layer_spectrum(
    layer: str, a: Tensor, b: Tensor, scaling: float, weight_norm: float | None = None
) -> LayerSpectrum:
    """The figures of one layer; `weight_norm` is the Frobenius norm of its W."""
    sigma = singular_values(a, b, scaling)
    total, energy = sigma.sum().item(), sigma.square()
    if total > 0.0:
        p = sigma[sigma > _NOISE * sigma[0]] / total
        effective = math.exp(-(p * p.log()).sum().item())
        reached = energy.cumsum(0) >= ENERGY * energy.sum()
        at_90 = int(reached.int().argmax()) + 1
    else:
        effective, at_90 = 0.0, 0
    norm = energy.sum().sqrt().item()
    share = None
    if weight_norm is not None:
        share = norm / weight_norm if weight_norm > 0.0 else math.inf
    return LayerSpectrum(layer, a.shape[0], scaling, sigma.tolist(), effective, at_90, norm, share)


_OF_LSTM = re.compile(r"^(.*)\.lora_A\.((?:ih|hh)_l\d+(?:_reverse)?)\.weight$")
_LSTM_LAYER = re.compile(r"^(.*)\.((?:ih|hh)_l\d+(?:_reverse)?)$")


def module_of(layer: str) -> str:
    """The module that `layer` is; for a weight of an LSTM (``lstm.ih_l0``) the LSTM."""
    found = _LSTM_LAYER.match(layer)
    return found.group(1) if found else layer


def weight_of(layer: str) -> str:
    """The name of the weight that the layer's update is for."""
    found = _LSTM_LAYER.match(layer)
    return f"{found.group(1)}.weight_{found.group(2)}" if found else f"{layer}.weight"


def pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """layer -> (A, B) of every adapted layer among `tensors`, under PEFT's names."""
    found = {}
    for key, a in tensors.items():
        lstm = _OF_LSTM.match(key)
        if lstm:
            b = tensors.get(key.replace(".lora_A.", ".lora_B."))
            if b is not None:
                found[f"{lstm.group(1)}.{lstm.group(2)}".removeprefix(PREFIX)] = (a, b)
        for mark_a, mark_b in _MARKS:
            if key.endswith(mark_a):
                stem = key.removesuffix(mark_a)
                b = tensors.get(stem + mark_b)
                if b is not None:
                    found[stem.removeprefix(PREFIX)] = (a, b)
    return found


def match_weights(layers: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """name of a base weight -> the layer it belongs to, for those of `names` that match.

    A file of the bare model lacks the prefix that the model with a head has (``bert.``, say), so
    a weight also matches when one of the two names ends with the other.
    """
    wanted = {weight_of(layer): layer for layer in layers}
    found = {}
    for name in names:
        if name in wanted:
            found[name] = wanted[name]
        elif ".weight" in name:
            for key, layer in wanted.items():
                if key.endswith(f".{name}") or name.endswith(f".{key}"):
                    found[name] = layer
                    break
    return found
