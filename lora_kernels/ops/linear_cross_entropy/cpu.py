"""linear_cross_entropy on the compiled CPU library: library GEMMs around csrc/linear_cross_entropy,
which turns a chunk of logits into losses and their gradient in place, without an fp32 copy."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels._backends import cpu as backend
from lora_kernels.ops.linear_cross_entropy import chunks
from lora_kernels.ops.linear_cross_entropy.problem import LinearCrossEntropyProblem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(problem: LinearCrossEntropyProblem) -> tuple[bool, str]:
    if problem.device != "cpu":
        return False, f"hidden is on {problem.device}, the library works on cpu tensors"
    module, reason = backend.load()
    if module is None:
        return False, reason
    if not hasattr(module, "linear_cross_entropy_rows"):
        return False, "lora_kernels._C predates linear_cross_entropy; rebuild it"
    if problem.dtype not in _DTYPES:
        return False, f"dtype {problem.dtype} is not supported; float32, bfloat16 and float16 are"
    return True, f"{module.linear_cross_entropy_engine(problem.dtype)} kernels"


class _Rows:
    """`rows_to_losses` of one set of options."""

    def __init__(
        self, ignore_index: int, label_smoothing: float, softcap: float, z_loss: float
    ) -> None:
        self.options = (ignore_index, label_smoothing, softcap, z_loss)
        self.module, _ = backend.load()

    def __call__(
        self, z: Tensor, labels: Tensor, coefficients: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        assert self.module is not None
        g = None if coefficients is None else coefficients.float().contiguous()
        losses = self.module.linear_cross_entropy_rows(z, labels.contiguous(), g, *self.options)
        return losses, None if g is None else z


def linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
) -> Tensor:
    """Losses [M], fp32."""
    return chunks.run(
        hidden, weight, labels, lora_a, lora_b, bias, scaling, ignore_index, None, [False] * 5,
        _Rows(ignore_index, label_smoothing, softcap, z_loss),
    )[0]  # fmt: skip


def linear_cross_entropy_grad(
    coefficients: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """Losses [M] and the gradients that `needs` names (hidden, weight, A, B, bias)."""
    return chunks.run(
        hidden, weight, labels, lora_a, lora_b, bias, scaling, ignore_index, coefficients, needs,
        _Rows(ignore_index, label_smoothing, softcap, z_loss),
    )  # fmt: skip
