"""Argument checks of lora_linear, in a fixed order: device, dtype, shape, values.

Every message is one line: the argument, what was given, what is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops.lora_linear.problem import DTYPES

_DTYPE_NAMES = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)


def _fail(message: str) -> None:
    raise InvalidArgumentError(f"lora_linear: {message}")


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


def check_dropout(dropout_p: float) -> None:
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0:
        _fail(f"dropout_p={dropout_p!r} is not a probability; accepted: 0 to 1")


def check_lengths(**lists: Sequence[object]) -> None:
    sizes = {name: len(values) for name, values in lists.items()}
    if 0 in sizes.values() or len(set(sizes.values())) != 1:
        given = ", ".join(f"{name}={n}" for name, n in sizes.items())
        _fail(f"the lists must have one entry per group member, at least one; got {given}")


def with_empty_adapters(
    weights: Sequence[Tensor], lora_as: Sequence[Tensor | None], lora_bs: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """A [0, K] and B [N, 0] in place of a group member's None, in the dtypes of the others."""
    made: list[list[Any]] = [list(lora_as), list(lora_bs)]
    for g, w in enumerate(weights):
        absent = lora_as[g] is None and lora_bs[g] is None
        if absent and len(weights) > 1 and isinstance(w, Tensor) and w.dim() == 2:
            for ts, shape in zip(made, ((0, w.shape[1]), (w.shape[0], 0)), strict=True):
                dtype = next((t.dtype for t in ts if isinstance(t, Tensor)), w.dtype)
                ts[g] = w.new_empty(shape, dtype=dtype)
    return made[0], made[1]


def check_tensors(
    x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor], biases: Sequence[Tensor | None], autocast: bool,
) -> None:  # fmt: skip
    named = [("x", x)]
    for g in range(len(weights)):
        tag = "" if len(weights) == 1 else f"[{g}]"
        named += [(f"weight{tag}", weights[g]), (f"lora_a{tag}", lora_as[g])]
        named += [(f"lora_b{tag}", lora_bs[g])]
        bias = biases[g]
        if bias is not None:
            named.append((f"bias{tag}", bias))
    for name, t in named:
        if not isinstance(t, Tensor):
            _fail(f"{name} is a {type(t).__name__}; accepted: torch.Tensor")
        if t.device != x.device:
            _fail(f"{name} is on {t.device} but x is on {x.device}; move them to one device")
    for name, t in named:
        if t.dtype not in DTYPES:
            _fail(f"{name} has dtype {t.dtype}; accepted: {_DTYPE_NAMES}")
    if x.dim() == 0:
        _fail("x is a scalar; accepted: [..., in_features]")
    k = x.shape[-1]
    least = 1 if len(weights) == 1 else 0
    for g, (w, a, b, bias) in enumerate(zip(weights, lora_as, lora_bs, biases, strict=True)):
        tag = "" if len(weights) == 1 else f"[{g}]"
        if w.dtype != x.dtype and not autocast:
            _fail(
                f"weight{tag} is {w.dtype} but x is {x.dtype}; convert one of them "
                "or use torch.autocast"
            )
        if w.dim() != 2 or w.shape[1] != k:
            _fail(
                f"weight{tag} has shape {_shape(w)}; accepted: [out_features, {k}] "
                f"for x {_shape(x)}"
            )
        if a.dim() != 2 or a.shape[1] != k or a.shape[0] < least:
            _fail(
                f"lora_a{tag} has shape {_shape(a)}; accepted: [r >= {least}, {k}] "
                f"for x {_shape(x)}"
            )
        if b.dim() != 2 or b.shape[0] != w.shape[0] or b.shape[1] != a.shape[0]:
            _fail(
                f"lora_b{tag} has shape {_shape(b)}; accepted: [{w.shape[0]}, {a.shape[0]}] "
                f"for weight {_shape(w)} and lora_a {_shape(a)}"
            )
        if bias is not None and (bias.dim() != 1 or bias.shape[0] != w.shape[0]):
            _fail(f"bias{tag} has shape {_shape(bias)}; accepted: [{w.shape[0]}]")
    if not any(a.shape[0] for a in lora_as):
        _fail("no member has an adapter; accepted: r >= 1 in one of them at least")


def check_given(
    name: str, t: Tensor, x: Tensor, lead: Sequence[int], rank: int, dropout_p: float
) -> None:
    """A given product of the adapter, S or dS: `lead` rows of `rank` columns, in the dtype of x."""
    if not isinstance(t, Tensor):
        _fail(f"{name} is a {type(t).__name__}; accepted: torch.Tensor or None")
    if t.device != x.device:
        _fail(f"{name} is on {t.device} but x is on {x.device}; move them to one device")
    if t.dtype != x.dtype:
        _fail(f"{name} has dtype {t.dtype}; accepted: {x.dtype}, in which x is multiplied")
    if tuple(t.shape) != (*lead, rank):
        _fail(f"{name} has shape {_shape(t)}; accepted: {[*lead, rank]}, all ranks side by side")
    if t.requires_grad:
        _fail(
            f"{name} requires a gradient; accepted: a value ({name}.detach()), for the gradients "
            "of x, A and B are those of the whole layer"
        )
    if dropout_p != 0.0:
        _fail(
            f"{name} is given with dropout_p={dropout_p!r}; accepted: dropout_p=0, since each "
            "member drops elements of its own"
        )


def check_scaling(scaling: float) -> None:
    if isinstance(scaling, Tensor):
        _fail("scaling is a tensor; accepted: a finite number")
    if torch.compiler.is_compiling():
        return  # a traced float has no value yet
    try:
        finite = math.isfinite(scaling)
    except TypeError:
        finite = False
    if not finite:
        _fail(f"scaling={scaling!r} is not usable; accepted: a finite number")


def make_seed(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """The dropout seed as an int64 tensor on `device`; drawn from torch's generator when None."""
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(0, 2**62, (), device=device, dtype=torch.int64)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            _fail(
                f"seed is a {seed.dtype} tensor of {seed.numel()} elements; "
                "accepted: an int or an int64 tensor of one element"
            )
        return seed.detach().reshape(()).to(device)
    if not isinstance(seed, int) or isinstance(seed, bool):
        _fail(f"seed={seed!r} is a {type(seed).__name__}; accepted: an int or an int64 tensor")
    if not 0 <= seed < 2**63:
        _fail(f"seed={seed} is out of range; accepted: 0 to 2**63 - 1")
    return torch.tensor(seed, device=device, dtype=torch.int64)
