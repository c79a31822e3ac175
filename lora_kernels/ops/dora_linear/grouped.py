"""DoRA layers that share one x, without dropout: one lora_linear of the group, a norm per member.

P_g = X W_g^T + s_g S_g B_g^T of all members is one grouped product, which reads x once; their dX is
the sum that its backward makes of all dP_g. Norms, magnitudes and biases are each member's own.
With dropout every layer has an x of its own, and nothing can be shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops._differentiable_once import differentiable_once
from lora_kernels.ops._eager import apply_function
from lora_kernels.ops.dora_linear import api, aten
from lora_kernels.ops.dora_linear.problem import inner_backend

_OP = "grouped_dora_linear"
_once = differentiable_once(_OP, "write the adapted weights out")


class _Call(NamedTuple):
    """What is not a tensor. keep: P of these members is kept for their magnitude's gradient."""

    scalings: tuple[float, ...]
    keep: tuple[bool, ...]
    backend: str


def grouped_dora_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    magnitudes: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    biases: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """:func:`lora_kernels.ops.dora_linear` for several frozen weights of one x.

    Args:
        x: ``[..., in_features]``.
        weights, lora_as, lora_bs, magnitudes, scalings, biases: one per member, as dora_linear has
            them. No gradient is computed for the weights.

    Returns:
        One ``[..., out_features_g]`` per member in the dtype of x, or autocast's.

    Raises:
        InvalidArgumentError: lists of different lengths, a weight that requires a gradient, or an
            argument that dora_linear would not accept.
    """
    n = len(weights)
    biases = [None] * n if biases is None else list(biases)
    lists = {"weights": weights, "lora_as": lora_as, "lora_bs": lora_bs,
             "magnitudes": magnitudes, "scalings": scalings, "biases": biases}  # fmt: skip
    if n == 0 or len({len(values) for values in lists.values()}) > 1:
        given = ", ".join(f"{name}={len(values)}" for name, values in lists.items())
        raise InvalidArgumentError(f"{_OP}: the lists must have one entry per member; got {given}")
    autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    for g in range(n):
        named = {"x": x, "weight": weights[g], "lora_a": lora_as[g], "lora_b": lora_bs[g],
                 "magnitude": magnitudes[g]}  # fmt: skip
        bias = biases[g]
        api._check_values(scalings[g], 0.0)
        api._check_tensors(named if bias is None else {**named, "bias": bias}, autocast)
        if weights[g].requires_grad:
            raise InvalidArgumentError(
                f"{_OP}: weights[{g}] requires a gradient; accepted: frozen weights"
            )
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    keep = tuple(torch.is_grad_enabled() and m.requires_grad for m in magnitudes)
    call = _Call(tuple(float(s) for s in scalings), keep, inner_backend(None))
    ys = apply_function(_Grouped, rows, call, *weights, *lora_as, *lora_bs, *magnitudes, *biases)
    shape = x.shape[:-1]
    return [torch.ops.aten._unsafe_view.default(y, (*shape, y.shape[-1])) for y in ys[:n]]


class _Grouped(torch.autograd.Function):
    """(x, call, *weights, *lora_as, *lora_bs, *magnitudes, *biases) -> (*Y, *P, *norms, S); a P
    that is not kept is empty."""

    @staticmethod
    def forward(x: Tensor, call: _Call, *flat: Any) -> tuple[Tensor, ...]:
        n = len(call.scalings)
        weights, lora_as, lora_bs, magnitudes, biases = (
            flat[i * n : (i + 1) * n] for i in range(5)
        )
        with without_autocast(x.device.type):
            ps, s = torch.ops.lora_kernels.lora_linear_fwd(
                x, [w.to(x.dtype) for w in weights], list(lora_as), list(lora_bs), [None] * n,
                list(call.scalings), 0.0, None, call.backend,
            )  # fmt: skip
            ys, norms, kept = [], [], []
            for g, p in enumerate(ps):
                norm, ratio = aten.norm_and_ratio(
                    weights[g], lora_as[g], lora_bs[g], magnitudes[g], call.scalings[g]
                )
                ys.append(aten.rescale(p, ratio, biases[g], None, call.keep[g]))
                norms.append(norm)
                kept.append(p if call.keep[g] else x.new_empty(0))
        return (*ys, *kept, *norms, s)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, call, *flat = inputs
        n = len(call.scalings)
        ctx.mark_non_differentiable(*output[n:])
        ctx.save_for_backward(x, *output[n:], *flat[: 4 * n])
        ctx.call = call
        ctx.bias_dtypes = [None if b is None else b.dtype for b in flat[4 * n :]]

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        n = len(call.scalings)
        x, *saved = ctx.saved_tensors
        ps, norms, s, flat = saved[:n], saved[n : 2 * n], saved[2 * n], saved[2 * n + 1 :]
        weights, lora_as, lora_bs, magnitudes = (flat[i * n : (i + 1) * n] for i in range(4))
        needs = ctx.needs_input_grad
        need_a, need_b, need_m, need_bias = (
            needs[2 + i * n : 2 + (i + 1) * n] for i in range(1, 5)
        )
        dys = [g.to(x.dtype) for g in grads[:n]]
        dps, dms = [], []
        with without_autocast(x.device.type):
            for g, dy in enumerate(dys):
                ratio = magnitudes[g].to(norms[g].dtype) / norms[g]
                dp, total = aten.through_magnitude(dy, ps[g] if need_m[g] else None, ratio)
                dps.append(dp)
                dms.append((total / norms[g]).to(magnitudes[g].dtype) if need_m[g] else None)
            dx, das, dbs = torch.ops.lora_kernels.lora_linear_bwd(
                dps, x, [w.to(x.dtype) for w in weights], lora_as, lora_bs, s,
                list(call.scalings), 0.0, None, needs[0], any(need_a), any(need_b), call.backend,
            )  # fmt: skip
        none = [None] * n
        return (
            dx if needs[0] else None, None, *none,
            *(d if need else None for d, need in zip(das or none, need_a, strict=True)),
            *(d if need else None for d, need in zip(dbs or none, need_b, strict=True)),
            *dms,
            *(
                dy.sum(0, dtype=d) if need else None
                for dy, d, need in zip(dys, ctx.bias_dtypes, need_bias, strict=True)
            ),
        )  # fmt: skip
