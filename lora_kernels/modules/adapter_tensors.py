"""Names and shapes of the tensors in an adapter file, in PEFT's format.

base_model.model.<layer>.lora_A.weight            [r, in_features]
base_model.model.<layer>.lora_B.weight            [out_features, r]
base_model.model.<layer>.lora_magnitude_vector    [out_features]       DoRA
base_model.model.<layer>.lora_embedding_A         [r, num_embeddings]  embeddings; B [dim, r]
base_model.model.<layer>.lora_A.weight            [r, in, *kernel]     convolutions; B [out, r, 1..]
base_model.model.<layer>.lora_A.ih_l0.weight      [r, columns]         LSTM (PEFT has no such layer)
base_model.model.<module>.<parameter>             as in the model      modules_to_save
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_kernels.errors import AdapterFileError
from lora_kernels.modules.adapted_layer import AdaptedLayer
from lora_kernels.modules.eligibility import DTYPES
from lora_kernels.modules.lora_linear import LoRALinear

PREFIX = "base_model.model."
_PLAIN = ("lora_A", "lora_B", "lora_magnitude_vector")
_KINDS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    # What older versions of PEFT wrote.
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
}
_OF_LSTM = re.compile(r"\.lora_([AB])\.((?:ih|hh)_l\d+(?:_reverse)?)\.weight$")


@dataclass
class AdapterTensors:
    """The tensors of a file: per layer by parameter name of the adapted layer, and the others."""

    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)


def of_layer(name: str, layer: LoRALinear | AdaptedLayer) -> dict[str, Tensor]:
    """File key -> tensor of one layer; sharded parameters are gathered (a collective call)."""
    if isinstance(layer, AdaptedLayer):
        return {f"{PREFIX}{name}.{key}": whole(p) for key, p in layer.factors().items()}
    tensors = {
        f"{PREFIX}{name}.lora_A.weight": whole(layer.lora_A),
        f"{PREFIX}{name}.lora_B.weight": whole(layer.lora_B),
    }
    if layer.lora_magnitude_vector is not None:
        tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = whole(layer.lora_magnitude_vector)
    return tensors


def whole(tensor: Tensor) -> Tensor:
    """`tensor` itself, or all of it when it is a distributed one."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather().detach()


def sort_tensors(tensors: dict[str, Tensor], path: object) -> AdapterTensors:
    """Which layer each tensor of a file belongs to.

    Raises:
        AdapterFileError: a name outside the format, a layer that lacks a factor, factors that do
            not fit each other, a dtype that is no adapter's, or a value that is not finite.
    """
    found = AdapterTensors()
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise AdapterFileError(f"{path}: tensor {key!r} does not start with {PREFIX!r}")
        rest = key.removeprefix(PREFIX)
        suffix = next((s for s in _KINDS if rest.endswith(s)), None)
        of_lstm = _OF_LSTM.search(rest)
        if of_lstm:
            layer = found.layers.setdefault(rest[: of_lstm.start()], {})
            layer[f"lora_{of_lstm.group(1)}_{of_lstm.group(2)}"] = tensor
        elif suffix is None and any(part.startswith("lora_") for part in rest.split(".")):
            raise AdapterFileError(
                f"{path}: tensor {key!r} is not supported; accepted: lora_A.weight, lora_B.weight, "
                "lora_magnitude_vector, lora_embedding_A and lora_embedding_B"
            )
        elif suffix is None:
            found.saved[rest] = tensor
        else:
            layer = found.layers.setdefault(rest.removesuffix(suffix), {})
            layer[_KINDS[suffix]] = tensor
        if tensor.is_floating_point() and not _finite(tensor):
            raise AdapterFileError(f"{path}: tensor {key!r} holds NaN or infinity")
    for name, factors in found.layers.items():
        _check_factors(name, factors, path)
    return found


def _finite(tensor: Tensor) -> bool:
    wide = tensor if tensor.dtype in DTYPES else tensor.float()
    return bool(torch.isfinite(wide).all())


def _check_factors(name: str, factors: dict[str, Tensor], path: object) -> None:
    for kind in list(factors):
        other = kind.replace("_A", "_B") if "_A" in kind else kind.replace("_B", "_A")
        if kind not in ("lora_A", "lora_B") and other not in factors:
            raise AdapterFileError(f"{path}: layer {name!r} has no {other}")
    plain = {k: t for k, t in factors.items() if k in _PLAIN}
    if len(plain) < len(factors):
        for kind, tensor in factors.items():
            if kind in plain or tensor.dtype not in DTYPES or tensor.dim() != 2:
                raise AdapterFileError(
                    f"{path}: {kind} of layer {name!r} is {tensor.dtype} {list(tensor.shape)}"
                )
        return
    for kind in ("lora_A", "lora_B"):
        if kind not in factors:
            raise AdapterFileError(f"{path}: layer {name!r} has no {kind}")
    for kind, tensor in factors.items():
        if tensor.dtype not in DTYPES:
            raise AdapterFileError(f"{path}: {kind} of layer {name!r} is {tensor.dtype}")
    a, b = factors["lora_A"], factors["lora_B"]
    fit = a.dim() == b.dim() and 2 <= a.dim() <= 5 and 1 <= a.shape[0] == b.shape[1]
    if not fit or any(size != 1 for size in b.shape[2:]):
        raise AdapterFileError(
            f"{path}: layer {name!r} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; "
            "accepted: [r, in_features] and [out_features, r] of a linear layer, "
            "[r, in, *kernel] and [out, r, 1, ...] of a convolution"
        )
    magnitude = factors.get("lora_magnitude_vector")
    if magnitude is not None and magnitude.shape != (b.shape[0],):
        raise AdapterFileError(
            f"{path}: layer {name!r} has lora_magnitude_vector {list(magnitude.shape)}; "
            f"accepted: [{b.shape[0]}]"
        )
