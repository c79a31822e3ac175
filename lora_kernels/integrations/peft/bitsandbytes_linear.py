"""PEFT's layers over bitsandbytes' linears with another forward; needs bitsandbytes."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import Tensor

from lora_kernels.integrations.peft import linear


class FusedLinear4bit(Linear4bit):
    """``peft.tuners.lora.bnb.Linear4bit`` on the fused op; no state of its own."""

    fused_by_lora_kernels = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As :meth:`FusedLoraLinear.forward`."""
        y = linear.grouped_or_fused(self, x, args, kwargs)
        return Linear4bit.forward(self, x, *args, **kwargs) if y is None else y

    def _get_name(self) -> str:
        return Linear4bit.__name__

    def extra_repr(self) -> str:
        return "forward fused by lora_kernels"


class FusedLinear8bitLt(Linear8bitLt):
    """``peft.tuners.lora.bnb.Linear8bitLt`` on the fused op; no state of its own."""

    fused_by_lora_kernels = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As :meth:`FusedLoraLinear.forward`; the activations are not rounded to eight bits."""
        y = linear.grouped_or_fused(self, x, args, kwargs)
        return Linear8bitLt.forward(self, x, *args, **kwargs) if y is None else y

    def _get_name(self) -> str:
        return Linear8bitLt.__name__

    def extra_repr(self) -> str:
        return "forward fused by lora_kernels"


STOCK_CLASSES: dict[type, type] = {FusedLinear4bit: Linear4bit, FusedLinear8bitLt: Linear8bitLt}
