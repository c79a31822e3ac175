"""rms_norm on random inputs, held to the budget by plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_kernels.ops.rms_norm.api import rms_norm
from lora_kernels.testing.budget import Margin, assert_within_budget
from lora_kernels.testing.inputs import relayout


@dataclass(frozen=True)
class RmsNormInputs:
    x: Tensor
    weight: Tensor | None
    eps: float
    offset: float
    lora_as: list[Tensor] = field(default_factory=list)


def rms_norm_inputs(
    shape: tuple[int, ...] = (17, 40),
    *,
    ranks: Sequence[int] = (),
    weighted: bool = True,
    eps: float = 0.1,
    offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    generator_seed: int = 0,
) -> RmsNormInputs:
    """Rows of sizes from 1/4 to 4, so that each has its own rstd and eps counts in some; offset +
    weight near 1 with a deviation of 1/2; y A^T of unit size."""
    generator = torch.Generator().manual_seed(generator_seed)
    features = shape[-1]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    rows = 4.0 ** (2.0 * torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64) - 1.0)
    weight = (1.0 - offset + 0.5 * normal(features)).to(weight_dtype or dtype)
    return RmsNormInputs(
        x=relayout((rows * normal(*shape)).to(dtype), layout),
        weight=relayout(weight, layout) if weighted else None,
        eps=eps,
        offset=offset,
        lora_as=[
            relayout((normal(r, features) * features**-0.5).to(adapter_dtype or dtype), layout)
            for r in ranks
        ],
    )


def formula(i: RmsNormInputs, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """y as transformers' models compute it, with one rounding, and y A^T; in fp64 for fp64."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + i.eps)
    if weight is not None:
        y = y * (i.offset + weight.to(wide.dtype))
    y = y.to(x.dtype)
    s = [y.detach() @ a.to(x.dtype).t() for a in i.lora_as]
    return y, torch.cat(s, -1) if s else y.new_empty(0)


def _gradients(y: Tensor, s: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    if y.requires_grad:
        y.backward(dy)
    grads = {f"d{n}": t.grad for n, t in leaves.items() if t.grad is not None}
    return {"y": y.detach(), **({"s": s} if s.numel() else {}), **grads}


def _leaves(i: RmsNormInputs, wide: bool, needs: Sequence[str] | None) -> dict[str, Tensor]:
    named = {"x": i.x} if i.weight is None else {"x": i.x, "weight": i.weight}
    return {
        n: (t.detach().double() if wide else t.detach()).requires_grad_(needs is None or n in needs)
        for n, t in named.items()
    }


def results(i: RmsNormInputs, *, wide: bool) -> dict[str, Tensor]:
    """y, s where there are adapters, and gradients of plain PyTorch; in fp64 where `wide`."""
    leaves = _leaves(i, wide, None)
    y, s = formula(i, leaves["x"], leaves.get("weight"))
    return _gradients(y, s, leaves)


def rms_norm_op(
    i: RmsNormInputs, backend: str | None, needs: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Results and gradients of the op; `needs` names the tensors to differentiate, all when
    None."""
    leaves = _leaves(i, False, needs)
    out = rms_norm(
        leaves["x"], leaves.get("weight"), i.eps, i.offset, lora_as=i.lora_as, backend=backend
    )
    y, s = out if isinstance(out, tuple) else (out, out.new_empty(0))
    return _gradients(y, s, leaves)


def check_rms_norm(
    i: RmsNormInputs, backend: str | None, needs: Sequence[str] | None = None
) -> dict[str, Margin]:
    """The op against the fp64 formula; raises BudgetExceededError, returns the margins."""
    oracle, low = results(i, wide=True), results(i, wide=False)
    return {
        name: assert_within_budget(t, oracle[name], low[name], f"{backend}: {name}")
        for name, t in rms_norm_op(i, backend, needs).items()
    }
