"""Quantized layers with adapters that share one x: one conversion, one node, one sum of dX.

Each weight is read by a call of its own: packed weights with statistics of their own cannot be
joined. What surrounds the calls is shared: x is converted to the dtype of the computation once and
kept once, and the members' dX are summed in fp32 and rounded once, where separate layers keep a
converted x each and have their dX rounded and added one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops import _dispatch
from lora_kernels.ops._differentiable_once import differentiable_once
from lora_kernels.ops._eager import apply_function
from lora_kernels.ops.quant_linear import contract, validate
from lora_kernels.ops.quant_linear.quant_tensor import QuantTensor

_OP = "grouped_quant_lora_linear"
_once = differentiable_once(_OP, "use torch.nn.functional.linear on the dequantized weights")


class _Call(NamedTuple):
    """What is not a tensor. parts: how many each member's weight has."""

    dtype: torch.dtype
    specs: tuple[str, ...]
    parts: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout_p: float
    backend: str


def grouped_quant_lora_linear(
    x: Tensor,
    qs: Sequence[QuantTensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    biases: Sequence[Tensor | None] | None = None,
    dropout_p: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """``x W_g^T + bias_g + scaling_g * dropout_g(x) A_g^T B_g^T`` for every member g.

    Args:
        x: ``[..., in_features]``, converted once.
        qs, lora_as, lora_bs, scalings, biases: one per member, as
            :func:`lora_kernels.ops.quant_lora_linear` has them.
        dropout_p: each member draws its own seed from torch's generator, in order, as separate
            layers would.
        compute_dtype: of the computation; None: that of x, or autocast's.
        backend: as in quant_lora_linear.

    Returns:
        One ``[..., out_features_g]`` per member, in the dtype of the computation.

    Raises:
        InvalidArgumentError: lists of different lengths, or an argument that quant_lora_linear
            would not accept.
        BackendUnavailableError: `backend` was given and cannot run a member.
    """
    n = len(qs)
    biases = [None] * n if biases is None else list(biases)
    lists = {"qs": qs, "lora_as": lora_as, "lora_bs": lora_bs, "scalings": scalings,
             "biases": biases}  # fmt: skip
    if n == 0 or len({len(values) for values in lists.values()}) > 1:
        given = ", ".join(f"{name}={len(values)}" for name, values in lists.items())
        raise InvalidArgumentError(f"{_OP}: the lists must have one entry per member; got {given}")
    validate.check_dropout(_OP, dropout_p)
    if compute_dtype is not None:
        validate.check_dtype(_OP, compute_dtype)
    for q, a, b, scaling, bias in zip(qs, lora_as, lora_bs, scalings, biases, strict=True):
        validate.check_quant_tensor(_OP, q)
        validate.check_scaling(_OP, scaling)
        for argument, t in (("lora_as", a), ("lora_bs", b)):
            validate.check_present(_OP, argument, t)
        validate.check_tensors(_OP, x, q, bias, a, b)
    dtype = x.dtype if compute_dtype is None else compute_dtype
    device = x.device.type
    if device != "meta" and dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    seeds = [validate.make_seed(_OP, None, dropout_p, x.device) for _ in range(n)]
    call = _Call(
        dtype, tuple(q.spec.key for q in qs), tuple(len(q.parts) for q in qs),
        tuple(float(s) for s in scalings), float(dropout_p), _dispatch.requested_backend(backend),
    )  # fmt: skip
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    parts = [part for q in qs for part in q.parts]
    ys = apply_function(_Grouped, rows, call, *biases, *lora_as, *lora_bs, *seeds, *parts)
    shape = x.shape[:-1]
    return [torch.ops.aten._unsafe_view.default(y, (*shape, y.shape[-1])) for y in ys[:n]]


class _Grouped(torch.autograd.Function):
    """(x, call, *biases, *lora_as, *lora_bs, *seeds, *parts) -> (*ys, *S, x as it was used)."""

    @staticmethod
    def forward(x: Tensor, call: _Call, *flat: Any) -> tuple[Tensor, ...]:
        used = x.to(call.dtype)
        n = len(call.specs)
        biases, lora_as, lora_bs, seeds = (flat[i * n : (i + 1) * n] for i in range(4))
        made = [
            contract.fwd(
                used, parts, spec, bias, a, b, scaling, call.dropout_p, seed, call.backend, None
            )
            for parts, spec, bias, a, b, scaling, seed in zip(
                _split(flat[4 * n :], call.parts), call.specs, biases, lora_as, lora_bs,
                call.scalings, seeds, strict=True,
            )
        ]  # fmt: skip
        kept = used if used is not x else x.new_empty(0)
        return (*(y for y, _ in made), *(s for _, s in made), kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, call, *flat = inputs
        n = len(call.specs)
        ctx.mark_non_differentiable(*output[n:])
        used = x if x.dtype == call.dtype else output[-1]
        ctx.save_for_backward(used, *output[n : 2 * n], *flat[n:])
        ctx.call, ctx.x_dtype = call, x.dtype
        ctx.bias_dtypes = [None if b is None else b.dtype for b in flat[:n]]

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        n = len(call.specs)
        x, *flat = ctx.saved_tensors
        ss, lora_as, lora_bs, seeds = (flat[i * n : (i + 1) * n] for i in range(4))
        needs = ctx.needs_input_grad
        need_x, need_bias, need_a, need_b = (
            needs[0], needs[2 : 2 + n], needs[2 + n : 2 + 2 * n], needs[2 + 2 * n : 2 + 3 * n],
        )  # fmt: skip
        total: Tensor | None = None
        das: list[Tensor | None] = []
        dbs: list[Tensor | None] = []
        dbiases: list[Tensor | None] = []
        weights = _split(flat[4 * n :], call.parts)
        for g, (parts, spec, scaling) in enumerate(
            zip(weights, call.specs, call.scalings, strict=True)
        ):
            dy = grads[g].to(call.dtype)
            da = db = None
            if need_x or need_a[g] or need_b[g]:
                dx, da, db = contract.bwd(
                    dy, x, parts, spec, lora_as[g], lora_bs[g], ss[g], scaling, call.dropout_p,
                    seeds[g], need_x, need_a[g], need_b[g], call.backend, None,
                )  # fmt: skip
                if need_x:
                    total = dx if total is None else _add(total, dx)
            das.append(da if need_a[g] else None)
            dbs.append(db if need_b[g] else None)
            dbiases.append(dy.sum(0, dtype=ctx.bias_dtypes[g]) if need_bias[g] else None)
        summed = None if total is None else total.to(ctx.x_dtype)
        return (summed, None, *dbiases, *das, *dbs, *[None] * (n + sum(call.parts)))


def _add(total: Tensor, dx: Tensor) -> Tensor:
    """In fp32, or fp64 for fp64; `total` is the sum's own from the second member on."""
    wide = torch.promote_types(dx.dtype, torch.float32)
    return (total if total.dtype == wide else total.to(wide)).add_(dx)


def _split(parts: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    found, at = [], 0
    for count in counts:
        found.append(list(parts[at : at + count]))
        at += count
    return found
