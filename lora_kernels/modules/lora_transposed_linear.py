"""A linear layer whose weight is stored [in, out] (transformers' Conv1D, as in GPT-2), adapted."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.adapted_layer import (
    AdaptedLayer,
    adapter_dtype_for,
    check_adapter,
    product,
)
from lora_kernels.ops import lora_linear


class LoRATransposedLinear(AdaptedLayer):
    """``y = x W + bias + scaling * dropout(x) A^T B^T`` with W [in_features, out_features] frozen.

    Keeps the keys ``weight`` and ``bias``; the adapter is that of :class:`lora_kernels.LoRALinear`,
    lora_A ``[r, in_features]`` and lora_B ``[out_features, r]``, and so are its files. PEFT calls
    this layout fan_in_fan_out.

    Args:
        weight: ``[in_features, out_features]``; bias ``[out_features]`` or None. Both are shared,
            frozen, not copied.
        r, alpha, dropout, rslora, adapter_dtype: as in LoRALinear.

    Raises:
        InvalidArgumentError: an argument that cannot be used.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        check_adapter(r, alpha, dropout, adapter_dtype)
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self._begin_adapter(r, alpha, dropout, rslora)
        self.in_features, self.out_features = weight.shape
        self.nf = self.out_features  # Conv1D's own name for it
        dtype = adapter_dtype_for(weight, adapter_dtype)
        self.lora_A = nn.Parameter(weight.new_empty(r, self.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(weight.new_empty(self.out_features, r, dtype=dtype))
        self.reset_adapter()

    @classmethod
    def from_conv1d(
        cls,
        conv1d: nn.Module,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRATransposedLinear:
        """From ``transformers.pytorch_utils.Conv1D``.

        Raises:
            InvalidArgumentError: another class, or an argument out of range.
        """
        if not is_conv1d(conv1d):
            raise InvalidArgumentError(
                f"conv1d is a {type(conv1d).__name__}; accepted: transformers.pytorch_utils.Conv1D"
            )
        bias = conv1d._parameters.get("bias")
        weight = conv1d._parameters["weight"]
        assert weight is not None
        layer = cls(weight, bias, r, alpha, dropout, rslora, adapter_dtype)
        return layer.train(conv1d.training)

    @torch.no_grad()
    def reset_adapter(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def factors(self) -> dict[str, nn.Parameter]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def updates(self) -> dict[str, Tensor]:
        return {"weight": product(self.lora_B, self.lora_A, self.scaling).t()}

    def forward(self, input: Tensor) -> Tensor:
        if self._runs_plain():
            return F.linear(input, self.weight.t(), self.bias)
        return lora_linear(
            input, self.weight.t(), self.lora_A, self.lora_B, self.scaling, bias=self.bias,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, " + (
            self._adapter_repr()
        )


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is exactly transformers' Conv1D, which need not be imported to tell."""
    kind = type(module)
    return kind.__module__ == "transformers.pytorch_utils" and kind.__qualname__ == "Conv1D"
