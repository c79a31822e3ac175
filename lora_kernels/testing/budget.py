"""The one pass rule for numbers: an error budget taken from an fp64 oracle.

A result passes when its error against the oracle is at most twice the error that plain PyTorch
makes in the same dtype, plus a band of one rounding step:

    |actual - fp64|  <=  FACTOR * (|low_precision - fp64| + eps(dtype) * |fp64|)

in the maximum norm and in the root mean square, each norm applied to all three terms, and every
element must be finite. The oracle's own rounding, eps(fp64), is added to the band; it only counts
when the dtype is fp64 too. The maximum norm finds a wrong tile or edge, the RMS finds a small error
everywhere. No test states an absolute or relative tolerance of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0


class BudgetExceededError(AssertionError):
    """A result is not finite, has another shape, or errs more than its budget allows."""


@dataclass(frozen=True)
class Margin:
    """Errors of a result as a share of its budget, in both norms; at most 1 passes."""

    max_norm: float
    rms: float


def _rms(t: Tensor) -> float:
    return math.sqrt(t.square().mean().item())


def _share(error: float, low_error: float, magnitude: float, eps: float, factor: float) -> float:
    budget = factor * (low_error + eps * magnitude)
    if budget == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / budget


def assert_within_budget(
    actual: Tensor,
    reference_fp64: Tensor,
    low_precision: Tensor,
    name: str = "tensor",
    factor: float = FACTOR,
) -> Margin:
    """Raise unless `actual` is as accurate as plain PyTorch in the dtype of `low_precision`.

    Args:
        actual: the result under test, any floating dtype.
        reference_fp64: the formula in fp64 on the very same (already rounded) inputs.
        low_precision: the formula in plain PyTorch in the compute dtype, which is what a user
            has without this package. Its dtype gives the eps of the band, so leave a gradient
            that was computed in bf16 in bf16, even if `actual` is returned in fp32.
        name: what to call the result in the message.
        factor: another than FACTOR where the field has a rule of its own for a result, which the
            caller then names: FlashAttention allows the gradients of attention 3.

    Returns:
        The :class:`Margin`: how much of the budget was used.

    Raises:
        BudgetExceededError: one line with the figures and the worst index.
    """
    for what, other in (
        ("fp64 reference", reference_fp64),
        ("low-precision result", low_precision),
    ):
        if actual.shape != other.shape:
            raise BudgetExceededError(
                f"{name}: shape {list(actual.shape)}, but the {what} has {list(other.shape)}"
            )
    if reference_fp64.dtype != torch.float64:
        raise BudgetExceededError(f"{name}: the reference is {reference_fp64.dtype}, not float64")
    if actual.numel() == 0:
        return Margin(0.0, 0.0)
    home = reference_fp64.device
    got, want, low = (t.detach().to(home).double() for t in (actual, reference_fp64, low_precision))
    bad = ~got.isfinite()
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise BudgetExceededError(
            f"{name}: {int(bad.sum())} of {got.numel()} elements are not finite, first {where}"
        )
    error, low_error = (got - want).abs(), (low - want).abs()
    eps = torch.finfo(low_precision.dtype).eps + torch.finfo(torch.float64).eps
    margin = Margin(
        _share(error.max().item(), low_error.max().item(), want.abs().max().item(), eps, factor),
        _share(_rms(error), _rms(low_error), _rms(want), eps, factor),
    )
    if not (margin.max_norm <= 1.0 and margin.rms <= 1.0):
        flat = int(error.argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))
        raise BudgetExceededError(
            f"{name}: error max {error.max():.3g} is {margin.max_norm:.3g} of its budget, "
            f"rms {_rms(error):.3g} is {margin.rms:.3g} of its budget "
            f"({low_precision.dtype}, plain PyTorch errs max {low_error.max():.3g} rms "
            f"{_rms(low_error):.3g}); worst at {where}: got {got.flatten()[flat]:.6g}, "
            f"fp64 {want.flatten()[flat]:.6g}"
        )
    return margin
