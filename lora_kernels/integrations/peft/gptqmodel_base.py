"""The int4 weight of a GPTQModel layer, GPTQ or AWQ, by its structure; nothing is imported.

Only kernels that keep the tensors as the checkpoint has them: the others (Marlin, ExLlama, ...)
shuffle them for themselves when the model is loaded.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.errors import LoraKernelsError
from lora_kernels.ops.quant_linear import QuantSpec, QuantTensor, from_state_dict

_MODULE = "gptqmodel.nn_modules.qlinear."
_GPTQ = ("TorchQuantLinear", "TorchLinear", "TritonV2QuantLinear", "TritonV2Linear")
_AWQ = ("AwqTorchQuantLinear", "AwqTorchLinear")
_PARTS = {"gptq": ("qweight", "qzeros", "scales", "g_idx"), "awq": ("qweight", "qzeros", "scales")}
# Layer -> where its tensors were, and the spec that was read from them.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], QuantSpec]] = (
    weakref.WeakKeyDictionary()
)


def kind_of(base: nn.Module) -> str:
    """``gptq``, ``awq``, or empty for any other layer."""
    cls = type(base)
    if not cls.__module__.startswith(_MODULE):
        return ""
    return "gptq" if cls.__name__ in _GPTQ else "awq" if cls.__name__ in _AWQ else ""


def quantized_weight(base: Any) -> tuple[QuantTensor | None, str]:
    """(the weight, sharing memory with `base`, "") or (None, why not)."""
    kind = kind_of(base)
    if getattr(base, "bits", None) != 4 or getattr(base, "pack_dtype", None) != torch.int32:
        return None, f"base_layer has {getattr(base, 'bits', None)} bits; 4 in int32 are fused"
    if getattr(base, "adapter", None) is not None:
        return None, "base_layer has an adapter of its own"
    names = _PARTS[kind]
    tensors = {name: getattr(base, name, None) for name in names}
    missing = [name for name, t in tensors.items() if not isinstance(t, Tensor) or t.is_meta]
    if missing:
        return None, f"base_layer has no {missing[0]}"
    parts = {name: t for name, t in tensors.items() if t is not None}
    layout = kind if kind == "awq" else {1: "gptq_v1", 2: "gptq"}.get(base.qzero_format(), "")
    if not layout:
        return None, "base_layer does not say how its zero points are stored"
    place = (layout, *((t.data_ptr(), t.shape, t._version) for t in parts.values()))
    cached = _known.get(base)
    if cached is None or cached[0] != place:
        try:
            q = from_state_dict(parts, layout=layout, block_size=base.group_size, bits=4)
        except LoraKernelsError as error:
            return None, f"base_layer cannot be read: {error}"
        if tuple(q.shape) != (base.out_features, base.in_features):
            return None, "base_layer is padded to other sizes"
        _known[base] = (place, q.spec)
        return q, ""
    return QuantTensor.unchecked(cached[1], tuple(parts[name] for name in names)), ""
