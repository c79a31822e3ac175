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


class _Rows(chunks.ChunkedRows):
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


linear_cross_entropy_fwd, linear_cross_entropy_grad = chunks.backend_pair(_Rows)
