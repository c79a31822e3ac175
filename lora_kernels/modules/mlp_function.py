"""A whole MLP with adapters as one autograd node: ``down(act(gate(x)) * up(x))``.

Saved: x, the S of gate and up, their results, the S of down, and the activation H unless it is
computed again. dH, the gradients of gate and up and H in the backward live inside one call. Where
it pays, dS and dB of gate and up are made with their gradients, and S of down with H (the op
gated_activation); S of gate and up may be given by a norm in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.modules.handed_shrink import Switch, backend_for
from lora_kernels.modules.layer_group import Operands
from lora_kernels.ops import _dispatch, grouped_lora_linear
from lora_kernels.ops import _pairs as _ops
from lora_kernels.ops import gated_activation as activate
from lora_kernels.ops._differentiable_once import differentiable_once

_once = differentiable_once("the MLP", "compute the activation with torch.nn.functional")
# Where products beside the activation were measured to be quicker than a pass of their own
# (docs/measured_facts.md). S of down comes for next to nothing with down's own packing of H.
_PRODUCTS = {("cpu", torch.bfloat16), ("cpu", torch.float32)}


class Plan(NamedTuple):
    """What is no tensor. `rates`: dropout of gate and up, and of down. `products`, `shrink`: the
    backend of gated_activation that makes dS and dB of gate and up, and S of down, on its way;
    empty: the layers make them. `packed`: one layer makes gate and up, in this order."""

    kind: str
    recompute: bool
    scalings: list[float]
    rates: tuple[float, float]
    backend: str
    products: str = ""
    shrink: str = ""
    packed: bool = False


def fused_mlp(
    x: Tensor, first: Sequence[Operands | None], down: Operands | None, kind: str,
    recompute: bool, shrink: Switch = False, shrunk: Tensor | None = None, packed: bool = False,
) -> Tensor | None:  # fmt: skip
    """The result of the MLP for x ``[..., hidden_size]``; None where its layers have to be called
    one by one.

    Args:
        first: operands of gate and up, or of up alone, or with `packed` of the layer that makes
            gate and up side by side; None: such a layer computes by itself.
        down: of the down projection.
        kind: as in :func:`lora_kernels.ops.gated_activation`.
        recompute: H is computed again in the backward.
        shrink: whether gated_activation makes S of down, and on a GPU dS and dB of gate and up; as
            :func:`lora_kernels.modules.handed_shrink.backend_for` has it.
        shrunk: S of gate and up for x, ``[..., sum of ranks]``, where somebody has it.
    """
    layers = [*first, down]
    dense = [o for o in layers if o is not None and o.lora_a is not None]
    if len(dense) < len(layers) or not _can_run(x, dense):
        return None
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    if any(o.weight.dtype != x.dtype for o in dense) and not torch.is_autocast_enabled(device):
        return None
    alone = shrunk is None and (shrink is False or (device == "cpu" and shrink == "auto"))
    if alone and not _differentiable(x, dense):
        return _layers(x, dense, kind, packed)
    rates = (dense[0].dropout_p, dense[-1].dropout_p)
    seeds = [
        None if p == 0.0 else torch.randint(0, 2**62, (), device=x.device, dtype=torch.int64)
        for p in rates
    ]
    name = _dispatch.requested_backend(None)
    plan = Plan(
        kind, recompute and _nobody_packs(), [o.scaling for o in dense], rates, name,
        *_made_in_the_activation(x, dense, kind, rates, shrink, name, packed),
        packed,
    )  # fmt: skip
    if shrunk is not None:
        fits = shrunk.dtype == x.dtype and rates[0] == 0.0
        shrunk = shrunk.flatten(0, -2) if fits and x.dim() > 1 else None
    parts = zip(*((o.weight, o.lora_a, o.lora_b, o.bias) for o in dense), strict=True)
    flat = [t for part in parts for t in part]
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    y = MlpFunction.apply(rows, plan, *seeds, shrunk, *flat)
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))


def _differentiable(x: Tensor, layers: list[Operands]) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad
        or any(t is not None and t.requires_grad for o in layers for t in (o[1], o[2], o[4]))
    )


def _layers(x: Tensor, layers: list[Operands], kind: str, packed: bool) -> Tensor:
    """The same without gradients: the calls that the node makes, and none of what it keeps."""
    gate, *up = _results(x, layers[:-1])
    if packed:
        gate, *up = gate.chunk(2, dim=-1)
    return _results(activate(gate, up[0] if up else None, kind), layers[-1:])[0]


def _results(x: Tensor, layers: list[Operands]) -> list[Tensor]:
    weights, lora_as, lora_bs, scalings, biases, rates = zip(*layers, strict=True)
    return grouped_lora_linear(
        x, weights, lora_as, lora_bs, scalings, biases=biases, dropout_p=rates[0]
    )


def _made_in_the_activation(
    x: Tensor, layers: list[Operands], kind: str, rates: tuple[float, float], shrink: Switch,
    name: str, packed: bool,
) -> tuple[str, str]:  # fmt: skip
    """`products` and `shrink` of the plan."""
    if packed:  # dS of gate and up belongs to one adapter, and no such MLP was measured
        asked = shrink is True and rates[1] == 0.0
        return "", backend_for(True, "activation_shrink", "fwd", x) if asked else ""
    measured = (x.device.type, x.dtype) in _PRODUCTS
    products, beside = name if measured and rates[0] == 0.0 else "", ""
    if shrink is False or (measured and shrink == "auto"):
        return products, beside
    shapes: dict[str, Any] = {
        "K": x.shape[-1], "N": tuple(o.weight.shape[0] for o in layers), "activation": kind,
        "rank": tuple(o.lora_a.shape[0] for o in layers if o.lora_a is not None),
        "adapter_dtype": layers[-1].lora_a.dtype if layers[-1].lora_a is not None else None,
    }  # fmt: skip
    if rates[0] == 0.0 and not products and torch.is_grad_enabled():
        products = backend_for(shrink, "activation_shrink", "bwd", x, **shapes)
    if rates[1] == 0.0:
        beside = backend_for(shrink, "activation_shrink", "fwd", x, **shapes)
    return products, beside


def _can_run(x: Tensor, layers: list[Operands]) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and x.device.type in ("cpu", "cuda")
        and x.numel() > 0
        and not any(o.weight.requires_grad for o in layers)
        and len({_kind(o) for o in layers[:-1]}) == 1
        and all(o.weight.device == x.device for o in layers)
        and layers[0].weight.dtype == layers[-1].weight.dtype
        and layers[0].weight.shape[1] == x.shape[-1]
    )


def _kind(o: Operands) -> tuple[object, ...]:
    """What layers of one call have to agree on."""
    assert o.lora_a is not None and o.lora_b is not None
    return o.dropout_p, o.weight.dtype, o.lora_a.dtype, o.lora_b.dtype


def _nobody_packs() -> bool:
    """Saved tensors are not somebody else's concern (checkpointing, offloading)."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(False) is None


class MlpFunction(torch.autograd.Function):
    """(x [M, K], plan, seed of gate and up, seed of down, given S of gate and up, *weights,
    *lora_as, *lora_bs, *biases) -> y [M, N]. The lists are in the order of gate, up, down, or up,
    down, or gate and up as one layer, down."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plan: Plan, seed: Tensor | None, seed_down: Tensor | None,
        shrunk: Tensor | None, *flat: Tensor | None,
    ) -> Tensor:  # fmt: skip
        n = len(plan.scalings)
        weights, lora_as, lora_bs, biases = (list(flat[i * n : (i + 1) * n]) for i in range(4))
        made, s = _ops.lora_linear_fwd(
            x, weights[:-1], lora_as[:-1], lora_bs[:-1], biases[:-1], plan.scalings[:-1],
            plan.rates[0], seed, plan.backend, None, shrunk,
        )  # fmt: skip
        s = s if shrunk is None else shrunk
        gate, *others = made[0].chunk(2, 1) if plan.packed else made
        up = others[0] if others else None
        beside = lora_as[-1:] if plan.shrink else []
        h, made_s = _ops.gated_activation_fwd(
            gate, up, plan.kind, beside, plan.shrink or plan.backend
        )
        (y,), s_down = _ops.lora_linear_fwd(
            h, weights[-1:], lora_as[-1:], lora_bs[-1:], biases[-1:], plan.scalings[-1:],
            plan.rates[1], seed_down, plan.backend, None, made_s if beside else None,
        )  # fmt: skip
        s_down = made_s if beside else s_down
        ctx.plan, ctx.bias_dtypes = plan, [None if b is None else b.dtype for b in biases]
        kept = None if plan.recompute else h
        ctx.save_for_backward(x, s, gate, up, kept, s_down, seed, seed_down, *flat[: 3 * n])
        return y

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, s, gate, up, h, s_down, seed, seed_down, *flat = ctx.saved_tensors
        plan, n = ctx.plan, len(ctx.plan.scalings)
        weights, lora_as, lora_bs = flat[:n], flat[n : 2 * n], flat[2 * n :]
        need_x, needs = ctx.needs_input_grad[0], list(ctx.needs_input_grad[5:])
        need_a, need_b, need_bias = (needs[i * n : (i + 1) * n] for i in (1, 2, 3))
        dy = grads[0] if grads[0].dtype == x.dtype else grads[0].to(x.dtype)
        below = need_x or any(need_a[:-1]) or any(need_b[:-1]) or any(need_bias[:-1])
        if h is None:
            h, _ = _ops.gated_activation_fwd(gate, up, plan.kind, [], plan.backend)
        dh, da_down, db_down = _ops.lora_linear_bwd(
            [dy], h, weights[-1:], lora_as[-1:], lora_bs[-1:], s_down, plan.scalings[-1:],
            plan.rates[1], seed_down, below, need_a[-1], need_b[-1], plan.backend,
        )  # fmt: skip
        del h
        dx: Tensor | None = None
        das: list[Tensor] = []
        dbs: list[Tensor] = []
        dys: list[Any] = [None] * (n - 1)
        if below:
            inner_b = any(need_b[:-1])
            with_products = bool(plan.products) and (need_x or any(need_a[:-1]))
            dgate, dup, ds, made = _ops.gated_activation_bwd(
                dh, gate, up, plan.kind, lora_bs[:-1] if with_products else [],
                s if with_products and inner_b else None, plan.scalings[:-1],
                plan.products if with_products else plan.backend,
            )  # fmt: skip
            dys = [dgate] if up is None else [dgate, dup]
            if plan.packed:
                dys = [torch.cat((dgate, dup), 1)]
            dx, das, dbs = _ops.lora_linear_bwd(
                dys, x, weights[:-1], lora_as[:-1], lora_bs[:-1], s, plan.scalings[:-1],
                plan.rates[0], seed, need_x, any(need_a[:-1]), inner_b and not made, plan.backend,
                None, ds if with_products else None,
            )  # fmt: skip
            dbs = made or dbs
        none = [None] * n
        all_das = [*(das or none[1:]), *(da_down or none[:1])]
        all_dbs = [*(dbs or none[1:]), *(db_down or none[:1])]
        dbiases = [
            d.sum(0, dtype=dtype) if need and d is not None else None
            for d, dtype, need in zip([*dys, dy], ctx.bias_dtypes, need_bias, strict=True)
        ]
        return (
            dx if need_x else None, None, None, None, None, *none,
            *(d if need else None for d, need in zip(all_das, need_a, strict=True)),
            *(d if need else None for d, need in zip(all_dbs, need_b, strict=True)),
            *dbiases,
        )  # fmt: skip
