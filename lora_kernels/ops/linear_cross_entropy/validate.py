"""Argument checks of linear_cross_entropy; every message is one line."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops.linear_cross_entropy.problem import DTYPES

REDUCTIONS = ("mean", "sum", "none")
_DTYPE_NAMES = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)


def _fail(message: str) -> None:
    raise InvalidArgumentError(f"linear_cross_entropy: {message}")


def check_options(
    scaling: float, label_smoothing: float, softcap: float | None, z_loss: float, reduction: str,
    ignore_index: int,
) -> None:  # fmt: skip
    if reduction not in REDUCTIONS:
        _fail(f"reduction={reduction!r} is unknown; accepted: {', '.join(REDUCTIONS)}")
    if torch.compiler.is_compiling():
        return  # a traced float has no value yet
    for name, value in (
        ("scaling", scaling), ("label_smoothing", label_smoothing), ("z_loss", z_loss),
    ):  # fmt: skip
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            _fail(f"{name}={value!r} is not usable; accepted: a finite number")
    if not 0.0 <= label_smoothing <= 1.0:
        _fail(f"label_smoothing={label_smoothing!r} is out of range; accepted: 0 to 1")
    if z_loss < 0.0:
        _fail(f"z_loss={z_loss!r} is negative; accepted: a factor of at least 0")
    if softcap is not None and (
        not isinstance(softcap, (int, float)) or not math.isfinite(softcap) or softcap <= 0.0
    ):
        _fail(f"softcap={softcap!r} is not usable; accepted: a number above 0, or None")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        _fail(f"ignore_index={ignore_index!r} is not usable; accepted: an int")


def check_tensors(
    hidden: Tensor, weight: Tensor, labels: Tensor, lora_a: Tensor | None,
    lora_b: Tensor | None, bias: Tensor | None, token_weights: Tensor | None, autocast: bool,
) -> None:  # fmt: skip
    named = {
        "hidden": hidden, "weight": weight, "labels": labels, "lora_a": lora_a,
        "lora_b": lora_b, "bias": bias, "token_weights": token_weights,
    }  # fmt: skip
    for name, t in named.items():
        if t is None and name not in ("hidden", "weight", "labels"):
            continue
        if not isinstance(t, Tensor):
            _fail(f"{name} is a {type(t).__name__}; accepted: torch.Tensor")
        elif t.device != hidden.device:
            _fail(
                f"{name} is on {t.device} but hidden is on {hidden.device}; move them to one device"
            )
        elif name == "labels":
            if t.dtype != torch.int64:
                _fail(f"labels has dtype {t.dtype}; accepted: int64")
        elif t.dtype not in DTYPES:
            _fail(f"{name} has dtype {t.dtype}; accepted: {_DTYPE_NAMES}")
    if hidden.dim() < 2:
        _fail(f"hidden has shape {list(hidden.shape)}; accepted: [..., tokens, hidden_size]")
    k, lead = hidden.shape[-1], list(hidden.shape[:-1])
    if weight.dim() != 2 or weight.shape[1] != k or weight.shape[0] < 1:
        _fail(f"weight has shape {list(weight.shape)}; accepted: [vocabulary >= 1, {k}]")
    if weight.dtype != hidden.dtype and not autocast:
        _fail(
            f"weight is {weight.dtype} but hidden is {hidden.dtype}; convert one of them "
            "or use torch.autocast"
        )
    v = weight.shape[0]
    for name, t in (("labels", labels), ("token_weights", token_weights)):
        if t is not None and list(t.shape) != lead:
            _fail(f"{name} has shape {list(t.shape)}; accepted: {lead}, one per hidden state")
    if (lora_a is None) != (lora_b is None):
        _fail("lora_a and lora_b belong together; give both or neither")
    if lora_a is not None and lora_b is not None:
        if lora_a.dim() != 2 or lora_a.shape[1] != k or lora_a.shape[0] < 1:
            _fail(f"lora_a has shape {list(lora_a.shape)}; accepted: [r >= 1, {k}]")
        if lora_b.dim() != 2 or tuple(lora_b.shape) != (v, lora_a.shape[0]):
            _fail(f"lora_b has shape {list(lora_b.shape)}; accepted: [{v}, {lora_a.shape[0]}]")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != v):
        _fail(f"bias has shape {list(bias.shape)}; accepted: [{v}]")


def check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """On the CPU, where looking costs nothing; a GPU's gather asserts on the device."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or labels.numel() == 0:
        return
    outside = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if bool(outside.any()):
        _fail(
            f"labels holds {int(labels[outside][0])}; accepted: 0 to {vocabulary - 1}, "
            f"or ignore_index={ignore_index}"
        )
