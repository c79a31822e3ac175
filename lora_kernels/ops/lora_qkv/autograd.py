"""Gradient of lora_qkv: dY is dZ turned back, into a new buffer; the rest is lora_linear's.

Saved: x, S [M, sum of ranks], the parameters, the seed, cos, sin and positions; no heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops._differentiable_once import differentiable_once
from lora_kernels.ops.lora_qkv import contract

_once = differentiable_once("lora_qkv", "call lora_linear's formula and rope one after the other")


class LoraQkvFunction(torch.autograd.Function):
    """(x, seed, cos, sin, position_ids, settings, *weights, *lora_as, *lora_bs, *biases) ->
    (*members, S); settings: (scalings, dropout_p, sequence, head_dim, rotated, interleaved,
    backend). S has no gradient."""

    @staticmethod
    def forward(
        x: Tensor, seed: Tensor | None, cos: Tensor, sin: Tensor, position_ids: Tensor | None,
        settings: tuple[Any, ...], *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        scalings, dropout_p, sequence, head_dim, rotated, interleaved, backend = settings
        n = len(scalings)
        ys, s = contract.fwd(
            x, list(flat[:n]), list(flat[n : 2 * n]), list(flat[2 * n : 3 * n]),
            list(flat[3 * n :]), list(scalings), dropout_p, seed, cos, sin, position_ids, sequence,
            head_dim, list(rotated), interleaved, backend,
        )  # fmt: skip
        return (*ys, s)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, seed, cos, sin, position_ids, settings, *flat = inputs
        n = len(settings[0])
        ctx.mark_non_differentiable(output[-1])
        ctx.save_for_backward(x, output[-1], seed, cos, sin, position_ids, *flat[: 3 * n])
        ctx.settings = settings
        ctx.bias_dtypes = [None if b is None else b.dtype for b in flat[3 * n :]]

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, s, seed, cos, sin, position_ids, *flat = ctx.saved_tensors
        scalings, dropout_p, sequence, head_dim, rotated, interleaved, backend = ctx.settings
        n = len(scalings)
        weights, lora_as, lora_bs = flat[:n], flat[n : 2 * n], flat[2 * n :]
        needs = ctx.needs_input_grad
        need_w, need_a, need_b, need_bias = (needs[6 + i * n : 6 + (i + 1) * n] for i in range(4))
        dys = [g if g.dtype == x.dtype else g.to(x.dtype) for g in grads[:n]]
        dys = _turned_back(dys, rotated, head_dim, sequence, cos, sin, position_ids, interleaved,
                           backend)  # fmt: skip
        dx: Tensor | None = None
        das: list[Tensor] = []
        dbs: list[Tensor] = []
        if needs[0] or any(need_a) or any(need_b):
            dx, das, dbs = torch.ops.lora_kernels.lora_linear_bwd.default(
                dys, x, weights, lora_as, lora_bs, s, list(scalings), dropout_p, seed,
                needs[0], any(need_a), any(need_b), backend,
            )  # fmt: skip
        dws = [(dy.t() @ x).to(w.dtype) if need else None
               for dy, w, need in zip(dys, weights, need_w, strict=True)]  # fmt: skip
        triples = zip(dys, ctx.bias_dtypes, need_bias, strict=True)
        dbiases = [dy.sum(0, dtype=d) if need else None for dy, d, need in triples]
        none = [None] * n
        return (
            dx if needs[0] else None, None, None, None, None, None,
            *dws,
            *(d if need else None for d, need in zip(das or none, need_a, strict=True)),
            *(d if need else None for d, need in zip(dbs or none, need_b, strict=True)),
            *dbiases,
        )  # fmt: skip


def _turned_back(
    dys: list[Tensor], rotated: tuple[int, ...], head_dim: int, sequence: int, cos: Tensor,
    sin: Tensor, position_ids: Tensor | None, interleaved: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    """dY [M, N_g] of every member; the gradients that come in are not written to."""
    if not any(rotated) or dys[0].shape[0] == 0:
        return dys
    heads = [
        dy[:, : n * head_dim].unflatten(1, (n, head_dim)).unflatten(0, (-1, sequence))
        for dy, n in zip(dys, rotated, strict=True)
        if n
    ]
    turned = torch.ops.lora_kernels.rope_bwd.default(
        heads, cos, sin, position_ids, interleaved, backend
    )
    made, rest = [], iter(turned)
    for dy, n in zip(dys, rotated, strict=True):
        if not n:
            made.append(dy)
            continue
        back = next(rest).flatten(0, 1).flatten(1)
        width = n * head_dim
        made.append(back if width == dy.shape[1] else torch.cat([back, dy[:, width:]], 1))
    return made
