"""A norm in front of layers that share its result: S = y A^T of them is made with y."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.modules import grouped_lora_linear
from lora_kernels.modules.grouped_lora_linear import GROUPED
from lora_kernels.modules.handed_shrink import Switch, backend_for, usable
from lora_kernels.modules.layer_group import AnyOperands, Operands, has_hooks
from lora_kernels.ops import rms_norm


class Given(NamedTuple):
    """S of a tensor and these A, side by side."""

    s: Tensor
    lora_as: tuple[Tensor, ...]

    def of(self, found: Sequence[AnyOperands]) -> Tensor | None:
        """S where a call with these operands multiplies by the very same A, else None."""
        own = [o.lora_a for o in found if o.lora_a is not None]
        same = len(own) == len(self.lora_as) and all(
            a is b for a, b in zip(own, self.lora_as, strict=True)
        )
        plain = all(isinstance(o, Operands) and o.dropout_p == 0.0 for o in found)
        return self.s if same and plain else None


def make_input_norm(
    wanted: bool, features: int, eps: float, device: Any, dtype: torch.dtype | None
) -> nn.Module | None:
    """A frozen RMS norm, or None."""
    if not wanted:
        return None
    return nn.RMSNorm(features, eps, device=device, dtype=dtype).requires_grad_(False)


def normalized(
    norm: nn.Module, x: Tensor, layers: Sequence[nn.Module], switch: Switch
) -> tuple[Tensor, Given | None]:
    """(norm(x), S of the adapted layers among these where `switch` has the norm make it).

    Only of torch.nn.RMSNorm over the last axis that nothing watches, and of dense LoRALinear
    without DoRA and dropout; every other norm and layer is called as it is.
    """
    if switch is False or not _is_plain(norm, x):
        return norm(x), None
    found = [operands for layer in layers if (operands := adapted(layer, x)) is not None]
    dense = [o for o in found if isinstance(o, Operands) and o.dropout_p == 0.0]
    lora_as = tuple(o.lora_a for o in dense if o.lora_a is not None)
    if not lora_as or len(dense) < len(found) or not usable(x, lora_as):
        return norm(x), None
    backend = backend_for(
        switch, "norm_shrink", "fwdbwd" if torch.is_grad_enabled() else "fwd", x, K=x.shape[-1],
        N=tuple(o.weight.shape[0] for o in dense), rank=tuple(a.shape[0] for a in lora_as),
        adapter_dtype=lora_as[0].dtype,
    )  # fmt: skip
    if not backend:
        return norm(x), None
    weight: Any = norm.weight
    eps: Any = norm.eps
    if eps is None:  # of the dtype that torch computes in
        eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    made = rms_norm(x, weight, eps, lora_as=[a.detach() for a in lora_as], backend=backend)
    assert isinstance(made, tuple)
    return made[0], Given(made[1], lora_as)


def adapted(layer: nn.Module, x: Tensor) -> AnyOperands | None:
    """Operands of exactly a LoRALinear or QuantLoRALinear that nothing watches."""
    exact = type(layer) in (*GROUPED, *GROUPED.values())
    if not exact or has_hooks(layer) or "forward" in layer.__dict__:
        return None
    return grouped_lora_linear.operands(layer, x)


def _is_plain(norm: nn.Module, x: Tensor) -> bool:
    cls = getattr(type(norm), "_lora_kernels_stock", type(norm))  # of a norm on the fused op
    return (
        cls is nn.RMSNorm
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and type(x) in (Tensor, nn.Parameter)
        and x.dim() > 1
        and x.numel() > 0
        and norm.normalized_shape == (x.shape[-1],)
        and not torch.is_autocast_enabled(x.device.type)
        and (norm.weight is None or norm.weight.dtype == x.dtype)
        and not has_hooks(norm)
        and "forward" not in norm.__dict__
    )
