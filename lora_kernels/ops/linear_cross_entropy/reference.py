"""Oracle of linear_cross_entropy: the formulas, in plain PyTorch, logits and all.

With H [M, K], W [V, K], A [r, K], B [V, r], scale s, softcap c, label y_i, smoothing e, z-loss q:

    z    = H W^T + bias + s (H A^T) B^T, then c tanh(z / c) where there is a softcap    [M, V]
    lse  = log sum_v exp(z_v)                                                           [M]
    loss = lse - (1 - e) z_y - e mean_v z_v + q lse^2          0 where y is ignore_index [M]
    dz   = g ((1 + 2 q lse) softmax(z) - (1 - e) onehot(y) - e / V) (1 - (z / c)^2)      [M, V]
    dH = dz W + s (dz B) A,  dW = dz^T H,  dA = s (dz B)^T H,  dB = s dz^T (H A^T),  dbias = sum dz

with g the coefficient of a token's loss in the sum that is differentiated. Losses and logits are
fp32 (fp64 for fp64 inputs), as transformers computes them; the products are in the dtype of H.
Sources: label smoothing as in torch.nn.functional.cross_entropy (Szegedy et al. 2015, arXiv
1512.00567); z-loss: Chowdhery et al. 2022, arXiv 2204.02311, section 5; softcap: Gemma 2, arXiv
2408.00118, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _logits(
    hidden: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None,
    bias: Tensor | None, scaling: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """z [M, V] in fp32 or fp64, and dz / dz_before_softcap."""
    dtype = hidden.dtype
    z = hidden @ weight.to(dtype).t()
    if bias is not None:
        z = z + bias.to(dtype)
    if lora_a is not None and lora_b is not None:
        z = z + scaling * ((hidden @ lora_a.to(dtype).t()) @ lora_b.to(dtype).t())
    z = z.double() if dtype == torch.float64 else z.float()
    if softcap == 0.0:
        return z, torch.ones_like(z)
    t = torch.tanh(z / softcap)
    return softcap * t, 1.0 - t * t


def _losses(
    z: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    valid = labels != ignore_index
    lse = torch.logsumexp(z, 1)
    at_label = z.gather(1, labels.where(valid, 0).unsqueeze(1)).squeeze(1)
    losses = lse - (1.0 - label_smoothing) * at_label - label_smoothing * z.mean(1)
    losses = losses + z_loss * lse * lse
    return losses.where(valid, 0.0), lse


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
    z, _ = _logits(hidden, weight, lora_a, lora_b, bias, scaling, softcap)
    return _losses(z, labels, ignore_index, label_smoothing, z_loss)[0]


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
    """Losses [M] and the gradients of sum_i coefficients_i loss_i: dH in the dtype of H, dW, dA,
    dB, dbias in the dtype of their tensor; what `needs` (that order) leaves out is empty."""
    dtype = hidden.dtype
    z, cap = _logits(hidden, weight, lora_a, lora_b, bias, scaling, softcap)
    losses, lse = _losses(z, labels, ignore_index, label_smoothing, z_loss)
    valid = labels != ignore_index
    g = coefficients.where(valid, 0.0).unsqueeze(1).to(z.dtype)
    lse = lse.unsqueeze(1)
    dz = (1.0 + 2.0 * z_loss * lse) * torch.exp(z - lse) - label_smoothing / z.shape[1]
    dz = dz.scatter_add(
        1, labels.where(valid, 0).unsqueeze(1), torch.full_like(lse, label_smoothing - 1.0)
    )
    dz = (g * dz * cap).to(dtype)
    grads = [hidden.new_empty(0) for _ in needs]
    if needs[0]:
        grads[0] = dz @ weight.to(dtype)
    if needs[1]:
        grads[1] = (dz.t() @ hidden).to(weight.dtype)
    if lora_a is not None and lora_b is not None:
        ds = scaling * (dz @ lora_b.to(dtype))
        if needs[0]:
            grads[0] = grads[0] + ds @ lora_a.to(dtype)
        if needs[2]:
            grads[2] = (ds.t() @ hidden).to(lora_a.dtype)
        if needs[3]:
            grads[3] = (scaling * (dz.t() @ (hidden @ lora_a.to(dtype).t()))).to(lora_b.dtype)
    if needs[4] and bias is not None:
        grads[4] = dz.sum(0).to(bias.dtype)
    return losses, grads
