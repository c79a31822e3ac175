"""What happens to a weight on its way from a checkpoint into the model.

The model waits on the meta device with ordinary linear layers. As soon as the tensors of a weight
are there, its layer is replaced by a QuantLinear: never is there more than one dense weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D

from lora_kernels.errors import QuantizedWeightError
from lora_kernels.modules.quant_linear import QuantLinear
from lora_kernels.ops.quant_linear import (
    QuantTensor,
    Reader,
    quantize,
    quantized_layers,
    read_layer,
)

if TYPE_CHECKING:
    from lora_kernels.integrations.transformers.quantizer import LoraKernelsQuantizer

Tensors = dict[str, Any]


def is_linear(module: nn.Module) -> bool:
    """A layer that can be replaced: exactly nn.Linear, or GPT-2's transposed form."""
    return type(module) in (nn.Linear, Conv1D)


def _features(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    n, k = _weight(module).shape
    return (k, n) if type(module) is Conv1D else (n, k)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _put(model: nn.Module, path: str, q: QuantTensor, compute_dtype: torch.dtype | None) -> None:
    old = model.get_submodule(path)
    new = QuantLinear.from_quantized(q, old.bias, compute_dtype).train(old.training)  # type: ignore[arg-type]
    for tensor in (new.weight, *new.buffers()):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    model.set_submodule(path, new)


def _one(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


class _Loading(ConversionOps):
    def __init__(self, hf_quantizer: LoraKernelsQuantizer) -> None:
        self.hf_quantizer = hf_quantizer


class ReadQuantized(_Loading):
    """Packed data and statistics of a layer to its QuantLinear; other weights as they are."""

    def convert(
        self,
        input_dict: Tensors,
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        *,
        full_layer_name: str = "",
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> Tensors:
        assert model is not None
        path = full_layer_name.rpartition(".")[0]
        prefix = f"{path}." if path else ""
        found = {prefix + name: _one(value) for name, value in input_dict.items()}
        kind = quantized_layers(found).get(prefix)
        module = model.get_submodule(path)
        dense = found.get(f"{prefix}weight")
        if kind is None:
            if dense is None or not dense.is_floating_point():
                name = next(iter(found))
                raise QuantizedWeightError(f"{name} is there without the other parts of its weight")
            wanted = model.get_parameter_or_buffer(full_layer_name).dtype  # type: ignore[operator]
            return {"weight": dense.to(wanted)}
        if not is_linear(module):
            raise QuantizedWeightError(
                f"{full_layer_name} is quantized in the checkpoint but belongs to a "
                f"{type(module).__name__}; accepted: torch.nn.Linear"
            )
        shape, dtype = _features(module), _weight(module).dtype
        config = self.hf_quantizer.quantization_config
        q = read_layer(Reader(found, prefix), kind, config.hints(dtype))
        if tuple(q.shape) != shape:
            raise QuantizedWeightError(
                f"{full_layer_name} has shape {list(q.shape)} in the checkpoint; the model's layer "
                f"has {list(shape)}"
            )
        _put(model, path, q, config.compute_dtype)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


class QuantizeDense(_Loading):
    """A weight of full precision to a QuantLinear."""

    def convert(
        self,
        input_dict: Tensors,
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        *,
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> Tensors:
        assert model is not None
        config = self.hf_quantizer.quantization_config
        left: Tensors = {}
        for name, value in input_dict.items():
            path = name.rpartition(".")[0]
            module = model.get_submodule(path)
            if not self.hf_quantizer.param_needs_quantization(model, name):  # type: ignore[arg-type]
                left[name] = value
                continue
            weight = _one(value).to(_weight(module).dtype)
            q = quantize(
                weight.t().contiguous() if type(module) is Conv1D else weight,
                config.format or "nf4", config.block_size, config.double_quant,
                quant_storage=config.quant_storage, name=name,
            )  # fmt: skip
            if tuple(q.shape) != _features(module):
                raise QuantizedWeightError(
                    f"{name} has shape {list(q.shape)} in the checkpoint; the model's layer has "
                    f"{list(_features(module))}"
                )
            _put(model, path, q, config.compute_dtype)
            if missing_keys is not None:
                missing_keys.discard(name)
        return left
