"""linear_cross_entropy over library calls: chunks of logits, their gradient made in place.

Per chunk of rows: the GEMM, an fp32 copy of the logits, log-sum-exp, the gradient in that copy,
and the GEMMs of the gradients. Formulas: reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops.linear_cross_entropy import chunks


def supports(problem: object) -> tuple[bool, str]:
    return True, "library GEMMs, some rows of logits at a time"


class _Rows:
    """`rows_to_losses` of one set of options."""

    def __init__(
        self, ignore_index: int, label_smoothing: float, softcap: float, z_loss: float
    ) -> None:
        self.ignore_index, self.smoothing = ignore_index, label_smoothing
        self.softcap, self.z_loss = softcap, z_loss

    def __call__(
        self, z: Tensor, labels: Tensor, coefficients: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        dtype = z.dtype
        z = z if dtype == torch.float64 else z.float()
        cap = None
        if self.softcap != 0.0:
            t = z.div_(self.softcap).tanh_()
            cap = None if coefficients is None else t.square().neg_().add_(1.0)
            z = t.mul_(self.softcap)
        valid = labels != self.ignore_index
        label = labels.where(valid, 0).unsqueeze(1)
        lse = torch.logsumexp(z, 1)
        losses = lse - (1.0 - self.smoothing) * z.gather(1, label).squeeze(1)
        if self.smoothing != 0.0:
            losses -= self.smoothing * z.mean(1)
        if self.z_loss != 0.0:
            losses += self.z_loss * lse * lse
        losses = losses.where(valid, 0.0)
        if coefficients is None:
            return losses, None
        g = coefficients.to(z.dtype).where(valid, 0.0).unsqueeze(1)
        lse = lse.unsqueeze(1)
        dz = z.sub_(lse).exp_().mul_(g * (1.0 + 2.0 * self.z_loss * lse))
        if self.smoothing != 0.0:
            dz.sub_(g * (self.smoothing / z.shape[1]))
        dz.scatter_add_(1, label, g * (self.smoothing - 1.0))
        if cap is not None:
            dz.mul_(cap)
        return losses, dz.to(dtype)


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
    """Losses [M], fp32 (fp64 for fp64 inputs)."""
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
