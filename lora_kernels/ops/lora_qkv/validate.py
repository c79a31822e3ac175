"""Argument checks of lora_qkv; every message is one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops.lora_qkv.problem import DTYPES

_DTYPE_NAMES = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)


def _fail(message: str) -> None:
    raise InvalidArgumentError(f"lora_qkv: {message}")


def check_lists(**lists: Sequence[Any]) -> None:
    sizes = {name: len(values) for name, values in lists.items()}
    if 0 in sizes.values() or len(set(sizes.values())) != 1:
        given = ", ".join(f"{name}={n}" for name, n in sizes.items())
        _fail(f"the lists must have one entry per projection, at least one; got {given}")


def with_empty_adapters(
    weights: Sequence[Tensor], lora_as: Sequence[Tensor | None], lora_bs: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """A [0, K] and B [N, 0] in place of a projection's None, in the dtypes of the others."""
    some = [(a, b) for a, b in zip(lora_as, lora_bs, strict=True) if a is not None]
    as_, bs = list(lora_as), list(lora_bs)
    for g, (w, a, b) in enumerate(zip(weights, lora_as, lora_bs, strict=True)):
        if a is None and b is None and isinstance(w, Tensor) and w.dim() == 2 and some:
            (n, k), (like_a, like_b) = w.shape, some[0]
            if isinstance(like_a, Tensor) and isinstance(like_b, Tensor):
                as_[g], bs[g] = like_a.new_empty(0, k), like_b.new_empty(n, 0)
    return as_, bs  # type: ignore[return-value]


def check_tensors(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, autocast: bool,
    **lists: Sequence[Tensor | None],
) -> None:  # fmt: skip
    named: list[tuple[str, Any]] = [("x", x), ("cos", cos), ("sin", sin)]
    for name, members in lists.items():
        optional = name == "biases"
        named += [
            (f"{name}[{g}]", t) for g, t in enumerate(members) if t is not None or not optional
        ]
    if position_ids is not None:
        named.append(("position_ids", position_ids))
    for name, t in named:
        if not isinstance(t, Tensor):
            _fail(f"{name} is a {type(t).__name__}; accepted: torch.Tensor")
        if t.device != x.device:
            _fail(f"{name} is on {t.device} but x is on {x.device}; move them to one device")
        if name == "position_ids":
            if t.dtype not in (torch.int32, torch.int64):
                _fail(f"position_ids has dtype {t.dtype}; accepted: int32, int64")
        elif t.dtype not in DTYPES:
            _fail(f"{name} has dtype {t.dtype}; accepted: {_DTYPE_NAMES}")
        elif name.startswith("weights") and t.dtype != x.dtype and not autocast:
            _fail(f"{name} is {t.dtype} but x is {x.dtype}; convert one of them")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        _fail("cos or sin requires a gradient, which is not computed; detach them")


def check_projections(
    x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None], scalings: Sequence[float], head_dim: int,
    rotated: Sequence[int],
) -> None:  # fmt: skip
    if x.dim() not in (2, 3):
        _fail(f"x has shape {list(x.shape)}; accepted: [B, S, in_features] or [T, in_features]")
    if type(head_dim) is not int or head_dim < 1:
        _fail(f"head_dim={head_dim!r} is not usable; accepted: an integer >= 1")
    k = x.shape[-1]
    members = zip(weights, lora_as, lora_bs, biases, scalings, rotated, strict=True)
    for g, (w, a, b, bias, scaling, heads) in enumerate(members):
        if w.dim() != 2 or w.shape[1] != k or w.shape[0] % head_dim:
            _fail(f"weights[{g}] has shape {list(w.shape)}; accepted: [heads * {head_dim}, {k}]")
        n = w.shape[0]
        if a.dim() != 2 or a.shape[1] != k:
            _fail(f"lora_as[{g}] has shape {list(a.shape)}; accepted: [r >= 0, {k}]")
        if b.dim() != 2 or tuple(b.shape) != (n, a.shape[0]):
            _fail(f"lora_bs[{g}] has shape {list(b.shape)}; accepted: [{n}, {a.shape[0]}]")
        if bias is not None and tuple(bias.shape) != (n,):
            _fail(f"biases[{g}] has shape {list(bias.shape)}; accepted: [{n}]")
        if type(heads) is not int or not 0 <= heads <= n // head_dim:
            _fail(f"rotated[{g}]={heads!r} is not usable; accepted: 0 to {n // head_dim} heads")
        if torch.compiler.is_compiling():
            continue  # a traced float has no value yet
        if not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
            _fail(f"scalings[{g}]={scaling!r} is not usable; accepted: a finite number")
    if not any(a.shape[0] for a in lora_as):
        _fail("no projection has an adapter; accepted: r >= 1 for one of them at least")


def check_rotation(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, head_dim: int,
    interleaved: bool,
) -> None:  # fmt: skip
    if not isinstance(interleaved, bool):
        _fail(f"interleaved={interleaved!r} is not usable; accepted: True or False")
    if cos.shape != sin.shape:
        _fail(f"sin has shape {list(sin.shape)}; accepted: {list(cos.shape)}, as cos")
    channels = cos.shape[-1] if cos.dim() else 0
    if channels < 2 or channels % 2 or channels > head_dim:
        _fail(
            f"cos has shape {list(cos.shape)}; accepted: an even number of channels from 2 to "
            f"{head_dim}, the size of a head"
        )
    lead = list(x.shape[:-1])
    allowed = [lead[-1:]] + ([lead, [1, lead[1]]] if len(lead) == 2 else [])
    if position_ids is None:
        if list(cos.shape[:-1]) not in allowed:
            _fail(
                f"cos has shape {list(cos.shape)}; accepted: {_either(allowed)} rows of "
                f"{channels}, one per position of x, or a cache and position_ids"
            )
    elif cos.dim() != 2:
        _fail(f"cos has shape {list(cos.shape)}; accepted with position_ids: [positions, R]")
    elif list(position_ids.shape) not in allowed:
        _fail(f"position_ids has shape {list(position_ids.shape)}; accepted: {_either(allowed)}")


def _either(shapes: list[list[int]]) -> str:
    return " or ".join(str(shape) for shape in shapes)


def check_dropout(dropout_p: float, seed: Any) -> None:
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0:
        _fail(f"dropout_p={dropout_p!r} is not a probability; accepted: 0 to 1")
    tensor = isinstance(seed, Tensor) and seed.dtype == torch.int64 and seed.numel() == 1
    whole = type(seed) is int and 0 <= seed < 2**63
    if seed is not None and not tensor and not whole:
        _fail(f"seed={seed!r}; accepted: an int from 0 to 2**63 - 1 or an int64 tensor of one")


def check_values(position_ids: Tensor | None, positions: int) -> None:
    """On the CPU, where looking costs nothing; kernels of a GPU give NaN."""
    if position_ids is None or position_ids.device.type != "cpu" or position_ids.numel() == 0:
        return
    if torch.compiler.is_compiling():
        return  # rope looks when it runs
    low, high = (int(t) for t in position_ids.aminmax())
    if low < 0 or high >= positions:
        wrong = low if low < 0 else high
        _fail(f"position_ids holds {wrong}; accepted: 0 to {positions - 1}, the rows of cos")
