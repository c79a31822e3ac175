"""lora_linear through a padded buffer; padded_block.py says what is computed and when it pays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops._differentiable_once import differentiable_once
from lora_kernels.ops._philox import keep_scale
from lora_kernels.ops._philox_jit import drop
from lora_kernels.ops.lora_linear import validate
from lora_kernels.ops.lora_linear.padded_block import PaddedBlock
from lora_kernels.ops.lora_linear.products import (
    add_dropped,
    joint_das,
    mm_accumulate,
    scaled_product,
)

_once = differentiable_once("lora_linear", "compute this layer with torch.nn.functional.linear")


class _PaddedLoraLinear(torch.autograd.Function):
    """(rows, block, scalings, dropout_p, seed, bias, *lora_as, *lora_bs) -> Y of all layers."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, block: PaddedBlock, scalings: tuple[float, ...], dropout_p: float,
        seed: Tensor | None, bias: Tensor | None, *adapters: Tensor,
    ) -> Tensor:  # fmt: skip
        k, top = block.in_features, block.top
        x, tail = rows[:, :k], rows[:, k:]
        if seed is not None or not rows.is_cuda:
            # On the CPU torch's bf16 product reads past a row of X and multiplies by zero.
            tail.zero_()
        if seed is not None:
            for g, part in enumerate(_columns(tail, block)):
                scale = scalings[g] * keep_scale(dropout_p)
                scaled_product(drop(x, seed, dropout_p, g), block.lora_as[g].t(), scale, part)
        else:
            # The rows of zeros below A make the unused columns of the tail zero, too.
            scaled_product(x, block.buffer[top:, :k].t(), _common(scalings), tail)
            _scale_apart(tail, block, scalings)
        y = F.linear(rows, block.buffer[:top], bias)
        # The tail is part of what is saved: S of a second call on these rows would be noticed.
        ctx.save_for_backward(rows, seed)
        ctx.block, ctx.scalings, ctx.dropout_p = block, scalings, dropout_p
        ctx.adapters = [t.dtype for t in adapters]
        ctx.version = block.buffer._version
        return y

    @staticmethod
    @_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, seed = ctx.saved_tensors
        block, scalings, n = ctx.block, ctx.scalings, len(ctx.scalings)
        if block.buffer._version != ctx.version:
            raise RuntimeError(
                "a weight or adapter of the padded block was changed between forward and backward"
            )
        needs = ctx.needs_input_grad
        need_a, need_b = needs[6 : 6 + n], needs[6 + n :]
        k, top = block.in_features, block.top
        x, tail = rows[:, :k], rows[:, k:]
        rescale = 1.0 if seed is None else keep_scale(ctx.dropout_p)
        das: list[Tensor | None] = [None] * n
        drows: Tensor | None = None
        if needs[0]:
            drows = dy @ block.buffer[:top]
            ds = drows[:, k:]
        elif any(need_a):
            ds = dy @ block.buffer[:top, k:]
        if needs[0] or any(need_a):
            common = _common(scalings) * rescale
            _scale_apart(ds, block, scalings)
            if any(need_a):
                das = _das(ds, x, block, ctx.adapters[:n], common, seed, ctx.dropout_p)
        if drows is not None:
            dx = drows[:, :k]
            if seed is None:
                dx.addmm_(ds, block.buffer[top:, :k], alpha=common)
            else:
                for g, part in enumerate(_columns(ds, block)):
                    add_dropped(dx, part * common, block.lora_as[g], ctx.dropout_p, seed, g)
            ds.zero_()  # Y does not depend on what the tail held before
        dbs: list[Tensor | None] = [None] * n
        for g, part in enumerate(dy.split(block.out_features, 1)):
            if need_b[g]:
                s = _columns(tail, block)[g]
                dbs[g] = mm_accumulate(part, s, ctx.adapters[n + g], 1.0)
        dbias = dy.sum(0) if needs[5] else None
        das = [d if need else None for d, need in zip(das, need_a, strict=True)]
        return drows, None, None, None, None, dbias, *das, *dbs


def _columns(tail: Tensor, block: PaddedBlock) -> list[Tensor]:
    """The columns of each layer."""
    return list(tail[:, : sum(block.ranks)].split(block.ranks, 1))


def _common(scalings: tuple[float, ...]) -> float:
    """The scaling that a product can take along: that of all layers, else 1."""
    return scalings[0] if len(set(scalings)) == 1 else 1.0


def _scale_apart(tail: Tensor, block: PaddedBlock, scalings: tuple[float, ...]) -> None:
    """Different scalings: the columns of each layer by its own."""
    if len(set(scalings)) > 1:
        for part, scaling in zip(_columns(tail, block), scalings, strict=True):
            part.mul_(scaling)


def _das(
    ds: Tensor, x: Tensor, block: PaddedBlock, dtypes: list[torch.dtype], common: float,
    seed: Tensor | None, dropout_p: float,
) -> list[Tensor | None]:  # fmt: skip
    """dA of every layer, in the dtype of its A; `common` has not been multiplied into dS yet."""
    if seed is not None:
        return [
            mm_accumulate(part, drop(x, seed, dropout_p, g), dtypes[g], common)
            for g, part in enumerate(_columns(ds, block))
        ]
    like = [x.new_empty(0, dtype=d) for d in dtypes]
    used = ds[:, : sum(block.ranks)]
    return [*joint_das(used, x, like, list(block.ranks), common)]


def padded_lora_linear(
    rows: Tensor,
    block: PaddedBlock,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    biases: Sequence[Tensor | None] | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> list[Tensor]:
    """:func:`grouped_lora_linear` through a :class:`PaddedBlock`, one library product per pass.

    Args:
        rows: ``[..., K + block.padding]``, contiguous, in the dtype of the weights. The first K
            columns hold X; the others are overwritten (with S, which the backward reads: rows
            serve one call). Its gradient has zeros there.
        block: made of these weights and adapters; what changed since is copied in first.
        weights: frozen. lora_as, lora_bs, scalings, biases, dropout_p, seed: as in
            :func:`grouped_lora_linear`, with the same masks.

    Returns:
        One ``[..., N_g]`` per layer: column ranges of one tensor ``[..., sum N]``.

    Raises:
        InvalidArgumentError: arguments that do not fit the block, or a weight that is trained.
    """
    n = len(block.ranks)
    biases = [None] * n if biases is None else list(biases)
    width = block.in_features + block.padding
    if any(len(ts) != n for ts in (weights, lora_as, lora_bs, scalings, biases)):
        raise InvalidArgumentError(f"the block has {n} layers; accepted: one entry for each")
    if rows.shape[-1] != width or rows.dtype != block.buffer.dtype or not rows.is_contiguous():
        raise InvalidArgumentError(
            f"rows is {list(rows.shape)} {rows.dtype}, contiguous={rows.is_contiguous()}; "
            f"accepted: contiguous [..., {width}] in {block.buffer.dtype}, see block.empty_rows"
        )
    if rows.device != block.buffer.device:
        raise InvalidArgumentError(f"rows is on {rows.device}; accepted: {block.buffer.device}")
    if any(w.requires_grad for w in weights):
        raise InvalidArgumentError("a weight is trained; accepted: frozen weights")
    validate.check_dropout(dropout_p)
    for scaling in scalings:
        validate.check_scaling(scaling)
    mask_seed = validate.make_seed(seed, dropout_p, rows.device)
    block.refresh(weights, lora_as, lora_bs)
    bias = _joined_bias(biases, block)
    flat = rows.flatten(0, -2) if rows.dim() > 1 else rows.unsqueeze(0)
    # Every dtype is settled: an autocast region must not change the products inside.
    with torch.autocast(rows.device.type, enabled=False):
        y = _PaddedLoraLinear.apply(
            flat, block, tuple(scalings), float(dropout_p), mask_seed, bias, *lora_as, *lora_bs
        )
    parts = y.split(block.out_features, 1) if n > 1 else (y,)
    return [part.reshape(*rows.shape[:-1], part.shape[-1]) for part in parts]


def _joined_bias(biases: Sequence[Tensor | None], block: PaddedBlock) -> Tensor | None:
    given = [b for b in biases if b is not None]
    if not given:
        return None
    for b, n in zip(biases, block.out_features, strict=True):
        if b is not None and b.shape != (n,):
            raise InvalidArgumentError(f"a bias is {list(b.shape)}; accepted: [{n}]")
    if len(biases) == 1:
        return given[0].to(block.buffer.dtype)
    parts = [
        block.buffer.new_zeros(n) if b is None else b.to(block.buffer.dtype)
        for b, n in zip(biases, block.out_features, strict=True)
    ]
    return torch.cat(parts)
