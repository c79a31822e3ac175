"""The registered op pair of linear_cross_entropy: schema, implementation, fake. Torch only.

`_grad` returns the losses as well, so that a training step makes the logits once: gradients of a
loss that will be scaled by one number do not need to wait for the backward. The pair is
deliberately not differentiable; autograd.py wraps it. Everything here is 2-D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops.linear_cross_entropy.problem import LinearCrossEntropyProblem, launcher

_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? lora_a, Tensor? lora_b, Tensor? bias, "
    "float scaling, int ignore_index, float label_smoothing, float softcap, float z_loss"
)
_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(f"linear_cross_entropy_fwd({_ARGUMENTS}, str backend) -> Tensor")
_library.define(
    f"linear_cross_entropy_grad(Tensor coefficients, {_ARGUMENTS}, bool[] needs, str backend) "
    "-> (Tensor losses, Tensor[] grads)"
)


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fwd(
    hidden: Tensor, weight: Tensor, labels: Tensor, lora_a: Tensor | None,
    lora_b: Tensor | None, bias: Tensor | None, scaling: float, ignore_index: int,
    label_smoothing: float, softcap: float, z_loss: float, backend: str,
) -> Tensor:  # fmt: skip
    if hidden.shape[0] == 0:
        return hidden.new_empty(0, dtype=_loss_dtype(hidden.dtype))
    module = launcher(LinearCrossEntropyProblem.of(hidden, weight, lora_a), backend)
    with without_autocast(hidden.device.type):
        return module.linear_cross_entropy_fwd(
            hidden, weight, labels, lora_a, lora_b, bias, scaling, ignore_index,
            label_smoothing, softcap, z_loss,
        )  # fmt: skip


def _grad(
    coefficients: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, lora_a: Tensor | None,
    lora_b: Tensor | None, bias: Tensor | None, scaling: float, ignore_index: int,
    label_smoothing: float, softcap: float, z_loss: float, needs: list[bool], backend: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    if hidden.shape[0] == 0:
        owners = (hidden, weight, lora_a, lora_b, bias)
        return hidden.new_empty(0, dtype=_loss_dtype(hidden.dtype)), [
            hidden.new_empty(0) if t is None or not need else t.new_zeros(t.shape)
            for t, need in zip(owners, needs, strict=True)
        ]
    module = launcher(LinearCrossEntropyProblem.of(hidden, weight, lora_a), backend)
    with without_autocast(hidden.device.type):
        return module.linear_cross_entropy_grad(
            coefficients, hidden, weight, labels, lora_a, lora_b, bias, scaling, ignore_index,
            label_smoothing, softcap, z_loss, needs,
        )  # fmt: skip


def _fwd_fake(
    hidden: Tensor, weight: Tensor, labels: Tensor, lora_a: Tensor | None,
    lora_b: Tensor | None, bias: Tensor | None, scaling: float, ignore_index: int,
    label_smoothing: float, softcap: float, z_loss: float, backend: str,
) -> Tensor:  # fmt: skip
    return hidden.new_empty(hidden.shape[0], dtype=_loss_dtype(hidden.dtype))


def _grad_fake(
    coefficients: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, lora_a: Tensor | None,
    lora_b: Tensor | None, bias: Tensor | None, scaling: float, ignore_index: int,
    label_smoothing: float, softcap: float, z_loss: float, needs: list[bool], backend: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    owners = (hidden, weight, lora_a, lora_b, bias)
    return hidden.new_empty(hidden.shape[0], dtype=_loss_dtype(hidden.dtype)), [
        hidden.new_empty(0) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip(owners, needs, strict=True)
    ]


for _key in ("CPU", "CUDA"):
    _library.impl("linear_cross_entropy_fwd", _fwd, _key)
    _library.impl("linear_cross_entropy_grad", _grad, _key)
torch.library.register_fake("lora_kernels::linear_cross_entropy_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("lora_kernels::linear_cross_entropy_grad", _grad_fake, lib=_library)

fwd = torch.ops.lora_kernels.linear_cross_entropy_fwd.default
grad = torch.ops.lora_kernels.linear_cross_entropy_grad.default
