"""Public function of the op: validation, one form for every caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from lora_kernels.ops import _dispatch
from lora_kernels.ops._eager import library_call
from lora_kernels.ops.gated_activation import autograd, contract, validate
from lora_kernels.ops.gated_activation.problem import KINDS


@overload
def gated_activation(
    gate: Tensor, up: Tensor | None = None, kind: str = "silu", *, backend: str | None = None
) -> Tensor: ...
@overload
def gated_activation(
    gate: Tensor,
    up: Tensor | None = None,
    kind: str = "silu",
    *,
    lora_as: Sequence[Tensor],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def gated_activation(
    gate: Tensor,
    up: Tensor | None = None,
    kind: str = "silu",
    *,
    lora_as: Sequence[Tensor] = (),
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``act(gate) * up``, or ``act(gate)`` without up; nothing but gate and up is saved.

    Args:
        gate: ``[..., features]``, any strides (a half of a fused projection, say); fp32, bf16,
            fp16 or fp64.
        up: the same shape and dtype, or None.
        kind: ``silu`` (SwiGLU), ``gelu`` and ``gelu_tanh`` (GEGLU, exact and approximate),
            ``relu``, ``relu_squared``.
        lora_as: A ``[r, features]`` of the adapters of the layers that take the result (the down
            projection), any floating dtype. With any, S is returned, too.
        backend: None or ``auto``, ``reference``, ``aten``, ``cpu``, ``triton``, ``cuda``. A backend
            asked for by name never falls back.

    Computed in the dtype of gate, also under ``torch.autocast``; where a backend rounds is in the
    op's README. Differentiable once; the backward computes the activation again.

    Returns:
        h, contiguous, in the shape and dtype of gate; with lora_as ``(h, s)``, where s
        ``[..., sum of r]`` in the dtype of gate is the rounded h times every A transposed. It is a
        value to hand on, and has no gradient of its own.

    Raises:
        InvalidArgumentError: shape, dtype, device or value of an argument; the message names it.
        BackendUnavailableError: `backend` was given and cannot run this problem.

    Source: Shazeer 2020, arXiv 2002.05202; formulas in reference.py.
    """
    plain = backend is None and type(lora_as) in (tuple, list) and not lora_as
    if plain and kind in KINDS:
        made = None if torch.compiler.is_compiling() else _eager(gate, up, kind)
        if made is not None:
            return made
    validate.check(gate, up, kind, lora_as)
    name = _dispatch.requested_backend(backend)
    rows = _rows(gate)
    factor = None if up is None else _rows(up)
    values = [a.detach() for a in lora_as]
    if torch.is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad)):
        if factor is not None and up is gate and torch.compiler.is_compiling():
            factor = factor.view_as(factor)  # no autograd function is traced with a tensor twice
        h, s = autograd.GatedActivationFunction.apply(rows, factor, kind, name, *values)
    else:
        h, s = contract.fwd(rows, factor, kind, values, name)
    h = _like(h, gate)
    return (h, _like(s, gate)) if lora_as else h


def _like(t: Tensor, gate: Tensor) -> Tensor:
    """t [M, n] with the leading shape of gate."""
    if gate.dim() == 2:
        return t
    return torch.ops.aten._unsafe_view.default(t, (*gate.shape[:-1], t.shape[-1]))


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.flatten(0, -2) if t.dim() > 2 else t.unsqueeze(0)


def _eager(gate: Tensor, up: Tensor | None, kind: str) -> Tensor | None:
    call = library_call("gated_activation_eager")
    return None if call is None else call(gate, up, kind)
