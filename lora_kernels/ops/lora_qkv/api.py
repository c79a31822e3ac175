"""Public function of the op: validation, autocast, flattening."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.ops import _dispatch
from lora_kernels.ops.lora_qkv import autograd, contract, validate


def lora_qkv(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    scalings: Sequence[float],
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
    rotated: Sequence[int],
    biases: Sequence[Tensor | None] | None = None,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """LoRA projections of an attention block with their rotary embedding, in one call.

    Args:
        x: ``[B, S, in_features]`` or packed ``[T, in_features]``; fp32, bf16, fp16 or fp64.
        weights: of each projection ``[heads * head_dim, in_features]`` in the dtype of x: three of
            them, or one that holds queries, keys and values in this order.
        lora_as, lora_bs, scalings, biases, dropout_p, seed: as in :func:`grouped_lora_linear`; a
            projection without an adapter has None (or a rank of 0), which triton does not take,
            nor cuda with dropout.
        cos, sin, interleaved, position_ids: as in :func:`rope`.
        head_dim: channels of a head.
        rotated: of each projection, how many of its heads are rotated, from the first on:
            ``(H, Hk, 0)``, or ``(H + Hk,)`` of one joint projection.
        backend: None or ``auto``, ``reference``, ``aten``, ``triton``, ``cuda``. A backend asked
            for by name never falls back.

    Under ``torch.autocast`` x is converted to the autocast dtype. Differentiable once.

    Returns:
        One ``[..., heads, head_dim]`` per projection, in the (autocast) dtype of x.

    Raises:
        InvalidArgumentError: shape, dtype, device or value of an argument; the message names it.
        BackendUnavailableError: `backend` was given and cannot run this problem.

    Source: Hu et al. 2021, arXiv 2106.09685; Su et al. 2021, arXiv 2104.09864; reference.py.
    """
    biases = [None] * len(weights) if biases is None else list(biases)
    validate.check_dropout(dropout_p, seed)
    validate.check_lists(
        weights=weights, lora_as=lora_as, lora_bs=lora_bs, scalings=scalings, biases=biases,
        rotated=rotated,
    )  # fmt: skip
    lora_as, lora_bs = validate.with_empty_adapters(weights, lora_as, lora_bs)
    autocast = (
        isinstance(x, Tensor)
        and x.device.type != "meta"
        and torch.is_autocast_enabled(x.device.type)
    )
    validate.check_tensors(
        x, cos, sin, position_ids, autocast,
        weights=weights, lora_as=lora_as, lora_bs=lora_bs, biases=biases,
    )  # fmt: skip
    validate.check_projections(x, weights, lora_as, lora_bs, biases, scalings, head_dim, rotated)
    validate.check_rotation(x, cos, sin, position_ids, head_dim, interleaved)
    validate.check_values(position_ids, cos.shape[0])
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    name = _dispatch.requested_backend(backend)
    drawn = _seed(seed, dropout_p, x.device)
    settings = (
        tuple(map(float, scalings)), float(dropout_p), x.shape[-2], head_dim, tuple(rotated),
        interleaved, name,
    )  # fmt: skip
    rows = x.flatten(0, -2)
    tensors = (x, *weights, *lora_as, *lora_bs, *biases)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if torch.compiler.is_compiling():  # no autograd function is traced with a tensor twice
            sin = sin.view_as(sin) if sin is cos else sin
        ys = autograd.LoraQkvFunction.apply(
            rows, drawn, cos, sin, position_ids, settings, *weights, *lora_as, *lora_bs, *biases
        )[:-1]
    else:
        ys, _ = contract.fwd(
            rows, list(weights), list(lora_as), list(lora_bs), biases, list(settings[0]),
            float(dropout_p), drawn, cos, sin, position_ids, x.shape[-2], head_dim, list(rotated),
            interleaved, name,
        )  # fmt: skip
    return [y.view(*x.shape[:-1], y.shape[1] // head_dim, head_dim) for y in ys]


def _seed(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """The dropout seed as an int64 tensor on `device`; drawn from torch's generator when None."""
    if dropout_p == 0.0:
        return None
    if isinstance(seed, Tensor):
        return seed.detach().reshape(()).to(device)
    if seed is None:
        return torch.randint(0, 2**62, (), device=device, dtype=torch.int64)
    return torch.tensor(seed, device=device, dtype=torch.int64)
