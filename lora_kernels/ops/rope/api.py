"""Public function of the op: validation, one form for every caller."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops import _dispatch
from lora_kernels.ops.rope import autograd, contract, validate


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotary position embedding of q and k in one call; nothing is changed in place.

    Args:
        q: ``[B, S, H, D]`` or packed ``[T, H, D]``, any strides; fp32, bf16, fp16 or fp64.
        k: ``[B, S, Hk, D]`` (packed ``[T, Hk, D]``) in the dtype of q, or None.
        cos, sin: any floating dtype, R even and at most D channels wide; the first R channels
            of a head are rotated, the others pass through. ``[S, R]`` (packed ``[T, R]``) or
            ``[B or 1, S, R]``, a row for each position of q; with position_ids a cache
            ``[positions, R]``. Each channel has its entry, as in transformers: a table of R / 2
            frequencies is repeated by the caller in the order of the layout.
        interleaved: pairs are channels (2 i, 2 i + 1) instead of (i, i + R / 2).
        position_ids: int32 or int64 ``[B or 1, S]`` or ``[S]`` (packed ``[T]``): rows of the cache.
        backend: None or ``auto``, ``reference``, ``aten``, ``cpu``, ``triton``, ``cuda``. A
            backend asked for by name never falls back.

    The rotation is computed in fp32 (fp64 for fp64) and rounded once to the dtype of q, also
    under ``torch.autocast``.

    Returns:
        q and k rotated, contiguous, in their shape and dtype; None where k is None.

    Raises:
        InvalidArgumentError: shape, dtype, device or value of an argument; the message names it.
        BackendUnavailableError: `backend` was given and cannot run this problem.

    Source: Su et al. 2021, arXiv 2104.09864; formulas in reference.py.
    """
    validate.check(q, k, cos, sin, interleaved, position_ids)
    name = _dispatch.requested_backend(backend)
    heads = [q] if k is None else [q, k]
    if torch.is_grad_enabled() and any(t.requires_grad for t in heads):
        if torch.compiler.is_compiling():  # no autograd function is traced with a tensor twice
            heads = [q] if k is None else [q, k.view_as(k) if k is q else k]
            sin = sin.view_as(sin) if sin is cos else sin
        outs = autograd.RopeFunction.apply(cos, sin, position_ids, interleaved, False, name, *heads)
    else:
        outs = contract.fwd(heads, cos, sin, position_ids, interleaved, name)
    return outs[0], None if k is None else outs[1]
