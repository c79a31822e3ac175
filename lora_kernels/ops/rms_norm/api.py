"""Public function of the op: validation, one form for every caller."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.ops import _dispatch
from lora_kernels.ops._eager import library_call
from lora_kernels.ops.rms_norm import autograd, contract, validate


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    *,
    lora_as: Sequence[Tensor] = (),
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x^2) + eps) * (offset + weight)`` over the last axis, rounded once.

    Args:
        x: ``[..., features]``, any strides, zero rows allowed; fp32, bf16, fp16 or fp64.
        weight: ``[features]`` in any of these dtypes, or None.
        eps: a number >= 0.
        offset: 0, or 1 for weights that are stored as the difference to 1 (Gemma); without
            effect where weight is None.
        lora_as: matrices ``[r, features]`` of adapters that read the result. With any, their
            products with it are made while it is at hand.
        backend: None or ``auto``, ``reference``, ``aten``, ``cpu``, ``triton``, ``cuda``. A backend
            asked for by name never falls back.

    Computed in fp32 (fp64 for fp64), also under ``torch.autocast``. A row has the same bits in any
    number of rows. Differentiable once in x and weight; saved are x, weight and one number a row.

    Returns:
        y: contiguous, in the shape and dtype of x, whatever the dtype of weight. With lora_as
        ``(y, s)``: s ``[..., sum of r]`` in the dtype of x is y A^T for all A side by side, from
        the rounded y, in fp32 sums. It is a value: gradients of y and A do not pass through it
        (``lora_linear(y, ..., shrunk=s)`` accounts for them).

    Raises:
        InvalidArgumentError: shape, dtype, device or value of an argument; the message names it.
        BackendUnavailableError: `backend` was given and cannot run this problem.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467; formulas in reference.py.
    """
    plain = backend is None and type(lora_as) in (tuple, list) and not lora_as
    if plain and type(eps) is type(offset) is float:
        made = None if torch.compiler.is_compiling() else _eager(x, weight, eps, offset)
        if made is not None:
            return made
    validate.check(x, weight, eps, offset, lora_as)
    name = _dispatch.requested_backend(backend)
    rows = x if x.dim() == 2 else x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)
    eps, offset = float(eps), float(offset)
    wanted = x.requires_grad or (weight is not None and weight.requires_grad)
    values = [a.detach() for a in lora_as]
    if torch.is_grad_enabled() and wanted:
        y, s = autograd.RmsNormFunction.apply(rows, weight, eps, offset, name, *values)
    else:
        y, _, s = contract.fwd(rows, weight, values, eps, offset, name)
    if x.dim() != 2:
        y = torch.ops.aten._unsafe_view.default(y, x.shape)
    if not lora_as:
        return y
    return y, s.view(*x.shape[:-1], s.shape[1])


def _eager(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor | None:
    call = library_call("rms_norm_eager")
    return None if call is None else call(x, weight, eps, offset)
