"""Public function of the op: validation, autocast, flattening."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops import _dispatch
from lora_kernels.ops.dora_linear import contract
from lora_kernels.ops.dora_linear.autograd import DoraLinearFunction
from lora_kernels.ops.dora_linear.problem import DTYPES


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x V^T * (magnitude / |V|) + bias`` with ``V = W + scaling B A`` and row norms |V|.

    The norms count as constants for the gradient, as in PEFT; all operands get theirs.

    Args:
        x: ``[..., in_features]``, any strides, zero rows allowed; fp32, bf16, fp16 or fp64.
        weight: ``[out_features, in_features]`` in the dtype of x. Usually frozen.
        lora_a: ``[r, in_features]``; lora_b ``[out_features, r]``; any floating dtype.
        magnitude: ``[out_features]``, any floating dtype.
        scaling: a finite number (``alpha / r``, say).
        bias: ``[out_features]`` or None; not scaled by the magnitude.
        dropout_p: probability of dropping an element of x before V; what is dropped still passes
            through W, as in PEFT: ``(x - xd) W^T + (magnitude / |V|) xd V^T + bias``. The draws
            are those of :func:`lora_kernels.ops.lora_linear` for the same seed.
        seed: int or int64 tensor of one element; None draws one from torch's generator.
        backend: None or ``auto``, ``reference``, ``aten``. ``auto`` computes the products with
            whatever backend lora_linear picks.

    Returns:
        ``[..., out_features]`` in the dtype of x, or under autocast in the autocast dtype.

    Raises:
        InvalidArgumentError: shape, dtype, device or value of an argument; the message names it.
        BackendUnavailableError: `backend` was given and cannot run this problem.

    Source: Liu et al. 2024, arXiv 2402.09353; formulas and gradients in reference.py.
    """
    _check_values(scaling, dropout_p)
    tensors = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "magnitude": magnitude}
    if bias is not None:
        tensors["bias"] = bias
    autocast = (
        isinstance(x, Tensor)
        and x.device.type != "meta"
        and torch.is_autocast_enabled(x.device.type)
    )
    _check_tensors(tensors, autocast)
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    # LORA_KERNELS_BACKEND may name a backend of lora_linear; a name given here must be one of ours.
    name = _dispatch.requested_backend(backend)
    name = "auto" if backend is None else name
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    seed = _make_seed(seed, dropout_p, x.device)
    differentiates = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
    keep = differentiates and magnitude.requires_grad
    arguments = (
        rows, weight, lora_a, lora_b, magnitude, bias, float(scaling), float(dropout_p), seed, keep,
        name,
    )  # fmt: skip
    if differentiates:
        y = DoraLinearFunction.apply(*arguments)[0]
    else:
        y = contract.fwd(*arguments)[0]
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))


def _fail(message: str) -> NoReturn:
    raise InvalidArgumentError(f"dora_linear: {message}")


def _check_values(scaling: object, dropout_p: object) -> None:
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= 1.0:
        _fail(f"dropout_p={dropout_p!r} is not a probability; accepted: 0 to 1")
    if isinstance(scaling, Tensor):
        _fail("scaling is a tensor; accepted: a finite number")
    if torch.compiler.is_compiling():
        return  # a traced float has no value yet
    if not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
        _fail(f"scaling={scaling!r} is not usable; accepted: a finite number")


def _check_tensors(named: dict[str, Any], autocast: bool) -> None:
    x, weight, a = (named[key] for key in ("x", "weight", "lora_a"))
    for name, t in named.items():
        if not isinstance(t, Tensor):
            _fail(f"{name} is a {type(t).__name__}; accepted: torch.Tensor")
        if t.device != x.device:
            _fail(f"{name} is on {t.device} but x is on {x.device}; move them to one device")
    for name, t in named.items():
        if t.dtype not in DTYPES:
            accepted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            _fail(f"{name} has dtype {t.dtype}; accepted: {accepted}")
    if weight.dtype != x.dtype and not autocast:
        _fail(f"weight is {weight.dtype} but x is {x.dtype}; convert one of them or use autocast")
    if x.dim() == 0:
        _fail("x is a scalar; accepted: [..., in_features]")
    k = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != k:
        _fail(f"weight has shape {list(weight.shape)}; accepted: [out_features, {k}]")
    if a.dim() != 2 or a.shape[1] != k or a.shape[0] < 1:
        _fail(f"lora_a has shape {list(a.shape)}; accepted: [r >= 1, {k}]")
    n = weight.shape[0]
    for name, shape in (("lora_b", (n, a.shape[0])), ("magnitude", (n,)), ("bias", (n,))):
        if name in named and tuple(named[name].shape) != shape:
            _fail(f"{name} has shape {list(named[name].shape)}; accepted: {list(shape)}")


def _make_seed(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(0, 2**62, (), device=device, dtype=torch.int64)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            _fail(f"seed is a {seed.dtype} tensor of {seed.numel()} elements; accepted: one int64")
        return seed.detach().reshape(()).to(device)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        _fail(f"seed={seed!r}; accepted: an integer from 0 to 2**63 - 1, or an int64 tensor")
    return torch.tensor(seed, device=device, dtype=torch.int64)
