"""Convolutions with a low-rank adapter, as PEFT has them."""

from __future__ import annotations

import math
from typing import Any, ClassVar

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

_POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _LoRAConv(AdaptedLayer):
    """The part that does not depend on the number of axes; `weight` is [out, in, *kernel]."""

    plain: ClassVar[Any]
    axes: ClassVar[int]
    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        bias: bool = True,
        padding_mode: str = "zeros",
        rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_adapter(r, alpha, dropout, adapter_dtype)
        self.plain.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias,
            padding_mode=padding_mode, device=device, dtype=dtype,
        )  # fmt: skip
        self._create_adapter(r, alpha, dropout, rslora, adapter_dtype)

    @classmethod
    def from_conv(
        cls,
        conv: Any,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> Any:
        """On the very weight and bias of `conv`, which are frozen, not copied.

        Raises:
            InvalidArgumentError: `conv` is not exactly the torch class, or is grouped, or an
                argument is out of range.
        """
        reason = conv_obstacle(conv)
        if reason or type(conv) is not cls.plain:
            reason = reason or f"it is a {type(conv).__name__}; accepted: {cls.plain.__name__}"
            raise InvalidArgumentError(f"conv cannot become a {cls.__name__}: {reason}")
        check_adapter(r, alpha, dropout, adapter_dtype)
        layer = cls.__new__(cls)
        cls.plain.__init__(
            layer, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
            conv.padding, conv.dilation, bias=conv.bias is not None,
            padding_mode=conv.padding_mode, device="meta", dtype=conv.weight.dtype,
        )  # fmt: skip
        layer.weight, layer.bias = conv.weight, conv.bias
        layer._create_adapter(r, alpha, dropout, rslora, adapter_dtype)
        return layer.train(conv.training)

    def _create_adapter(
        self, r: int, alpha: float, dropout: float, rslora: bool, adapter_dtype: torch.dtype | None
    ) -> None:
        self._begin_adapter(r, alpha, dropout, rslora)
        weight = self.weight
        dtype = adapter_dtype_for(weight, adapter_dtype)
        self.lora_A = nn.Parameter(weight.new_empty(r, *weight.shape[1:], dtype=dtype))
        ones = (1,) * self.axes
        self.lora_B = nn.Parameter(weight.new_empty(weight.shape[0], r, *ones, dtype=dtype))
        self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def factors(self) -> dict[str, nn.Parameter]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def updates(self) -> dict[str, Tensor]:
        update = product(self.lora_B.flatten(1), self.lora_A.flatten(1), self.scaling)
        return {"weight": update.view(self.weight.shape)}

    def forward(self, input: Tensor) -> Tensor:
        y = self.plain.forward(self, input)
        if self._runs_plain():
            return y
        x = input
        if x.dtype != self.lora_A.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        shrunk = self._conv_forward(x, self.lora_A, None)  # type: ignore[operator]
        update = _POINTWISE[self.axes](shrunk, self.lora_B) * self.scaling
        return (y + update).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.plain.extra_repr(self)}, {self._adapter_repr()}"


_DOCUMENTATION = """``conv(x, W) + bias + scaling * conv1x1(conv(dropout(x), A), B)``, W frozen.

    A drop-in for :class:`torch.nn.{name}` without groups; the adapter adds the parameters

        lora_A    [r, in_channels, *kernel]          Kaiming uniform; strides and pads as W
        lora_B    [out_channels, r, 1, ...]          zeros, so a new adapter changes nothing

    which is a convolution with W + scaling * B A. Arguments as in torch.nn.{name}, and r, alpha,
    dropout, rslora, adapter_dtype as in :class:`lora_kernels.LoRALinear`. PEFT's own layer ignores
    dilation and padding_mode in A; here A follows W.

    Raises:
        InvalidArgumentError: an argument that cannot be used.

    Source: the convolution layers of PEFT's LoRA; Hu et al. 2021, arXiv 2106.09685.
    """


class LoRAConv1d(_LoRAConv, nn.Conv1d):
    __doc__ = _DOCUMENTATION.format(name="Conv1d")
    plain, axes = nn.Conv1d, 1


class LoRAConv2d(_LoRAConv, nn.Conv2d):
    __doc__ = _DOCUMENTATION.format(name="Conv2d")
    plain, axes = nn.Conv2d, 2


class LoRAConv3d(_LoRAConv, nn.Conv3d):
    __doc__ = _DOCUMENTATION.format(name="Conv3d")
    plain, axes = nn.Conv3d, 3


def conv_obstacle(conv: nn.Module) -> str:
    """Why `conv` cannot carry an adapter; empty when it can."""
    if type(conv) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        kind = f"{type(conv).__module__}.{type(conv).__qualname__}"
        return f"its type is {kind}; accepted: exactly torch.nn.Conv1d, Conv2d or Conv3d"
    if conv.groups != 1:
        return f"it has {conv.groups} groups, across which an update of low rank would leak"
    return ""
