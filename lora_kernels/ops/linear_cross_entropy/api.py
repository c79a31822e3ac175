"""Public function of the op: validation, autocast, flattening, reduction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.ops import _dispatch
from lora_kernels.ops.linear_cross_entropy import autograd, contract, validate


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    shift: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross entropy of ``hidden (W + scaling B A)^T + bias`` without keeping the logits.

    Some rows of logits at a time are made, turned into losses and, where a gradient is asked
    for, into their own gradient in place; memory is a chunk of rows instead of
    ``tokens x vocabulary``. For a mean or a sum the gradients are computed in the same pass as
    the loss.

    Args:
        hidden: ``[..., K]``, at least 2-D; fp32, bf16, fp16 or fp64.
        weight: ``[V, K]`` in the dtype of hidden: the head, usually frozen, may be tied.
        labels: int64 ``[...]``, the leading shape of hidden; ``ignore_index`` counts nothing.
        lora_a, lora_b: ``[r, K]`` and ``[V, r]``, an adapter on the head; any floating dtype
            (fp32 adapters over a bf16 head get fp32 gradients).
        scaling: of the adapter.
        bias: ``[V]`` or None.
        label_smoothing: 0 to 1, as in ``torch.nn.functional.cross_entropy``.
        softcap: ``c`` of ``c tanh(logits / c)``, or None.
        z_loss: factor of ``logsumexp^2``, added to each token's loss.
        token_weights: ``[...]`` factor of each token's loss; not differentiated.
        shift: the label of a position is its successor's, and the last position of each
            sequence has none, as a causal language model is trained.
        reduction: ``mean`` divides by the number of tokens that count (by the sum of their
            weights where given; nothing that counts: NaN, as torch gives), ``sum``, or ``none``.
        backend: None or ``auto``, ``reference``, ``aten``, ``cpu``, ``triton``. A backend asked for
            by name never falls back.

    Under ``torch.autocast`` hidden is converted to the autocast dtype.

    Returns:
        A scalar, or for ``none`` the leading shape of hidden; fp32 (fp64 for fp64 inputs).

    Raises:
        InvalidArgumentError: shape, dtype, device or value of an argument; the message names it.
        BackendUnavailableError: `backend` was given and cannot run this problem.

    Source: formulas and gradients in reference.py.
    """
    validate.check_options(scaling, label_smoothing, softcap, z_loss, reduction, ignore_index)
    autocast = isinstance(hidden, Tensor) and torch.is_autocast_enabled(hidden.device.type)
    validate.check_tensors(hidden, weight, labels, lora_a, lora_b, bias, token_weights, autocast)
    validate.check_labels(labels, weight.shape[0], ignore_index)
    if autocast and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    name = _dispatch.requested_backend(backend)
    lead = labels.shape
    if shift:
        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if token_weights is not None:
            token_weights = F.pad(token_weights, (0, 1))[..., 1:]
    rows, labels = hidden.flatten(0, -2), labels.flatten()
    options = (
        float(scaling), ignore_index, float(label_smoothing), float(softcap or 0.0), float(z_loss)
    )  # fmt: skip
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    valid = labels != ignore_index
    weights = None if token_weights is None else token_weights.detach().flatten().to(wide)
    if reduction == "none":
        losses = autograd.TokenLossesFunction.apply(
            rows, weight, lora_a, lora_b, bias, labels, options, name
        )
        return (losses if weights is None else losses * weights.where(valid, 0.0)).view(lead)
    ones = valid.to(wide)
    coefficients = ones if weights is None else weights.where(valid, 0.0)
    if reduction == "mean":
        total = coefficients.sum()
        coefficients = (coefficients / total).where(valid, 0.0)
    tensors = (rows, weight, lora_a, lora_b, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        loss = autograd.ReducedLossFunction.apply(coefficients, *tensors, labels, options, name)
    else:
        losses = contract.fwd(rows, weight, labels, lora_a, lora_b, bias, *options, name)
        loss = (losses * coefficients).sum()
    return loss if reduction == "sum" else torch.where(total == 0.0, total / total, loss)
