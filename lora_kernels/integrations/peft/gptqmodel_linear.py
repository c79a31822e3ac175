"""PEFT's layers over GPTQModel's linears, GPTQ and AWQ, with another forward."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import Tensor

from lora_kernels.integrations.peft import linear


class FusedGPTQLoraLinear(GPTQLoraLinear):
    """``peft.tuners.lora.gptq.GPTQLoraLinear`` on the fused op; no state of its own."""

    fused_by_lora_kernels = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As :meth:`FusedLoraLinear.forward`."""
        y = linear.grouped_or_fused(self, x, args, kwargs)
        return GPTQLoraLinear.forward(self, x, *args, **kwargs) if y is None else y

    def _get_name(self) -> str:
        return GPTQLoraLinear.__name__

    def extra_repr(self) -> str:
        return "forward fused by lora_kernels"


class FusedAwqLoraLinear(AwqLoraLinear):
    """``peft.tuners.lora.awq.AwqLoraLinear`` on the fused op; no state of its own."""

    fused_by_lora_kernels = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As :meth:`FusedLoraLinear.forward`."""
        y = linear.grouped_or_fused(self, x, args, kwargs)
        return AwqLoraLinear.forward(self, x, *args, **kwargs) if y is None else y

    def _get_name(self) -> str:
        return AwqLoraLinear.__name__

    def extra_repr(self) -> str:
        return "forward fused by lora_kernels"


STOCK_CLASSES: dict[type, type] = {
    FusedGPTQLoraLinear: GPTQLoraLinear,
    FusedAwqLoraLinear: AwqLoraLinear,
}
