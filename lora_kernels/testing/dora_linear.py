"""dora_linear against its plain formula under autograd, in fp64 and in the compute dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.ops._philox import keep_mask, keep_scale
from lora_kernels.ops.dora_linear import dora_linear
from lora_kernels.testing.budget import Margin, assert_within_budget
from lora_kernels.testing.inputs import LoraLinearInputs, lora_linear_inputs, relayout

OPERANDS = ("x", "weight", "lora_a", "lora_b", "magnitude", "bias")


@dataclass(frozen=True)
class DoraLinearInputs:
    """A lora_linear problem of one member, and a magnitude that is not the norm of V."""

    plain: LoraLinearInputs
    magnitude: Tensor

    def operands(self) -> dict[str, Tensor]:
        i = self.plain
        found = {
            "x": i.x, "weight": i.weights[0], "lora_a": i.lora_as[0], "lora_b": i.lora_bs[0],
            "magnitude": self.magnitude,
        }  # fmt: skip
        if i.biases[0] is not None:
            found["bias"] = i.biases[0]
        return found

    def with_layout(self, layout: str) -> DoraLinearInputs:
        return DoraLinearInputs(self.plain.with_layout(layout), relayout(self.magnitude, layout))


def dora_linear_inputs(
    M: int | tuple[int, ...] = 7,
    K: int = 20,
    N: int = 33,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    *,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    scaling: float = 0.7,
    dropout_p: float = 0.0,
    seed: int = 1234,
    generator_seed: int = 0,
) -> DoraLinearInputs:
    """As :func:`lora_linear_inputs`; the magnitude is |V| times 0.5 to 1.5."""
    i = lora_linear_inputs(
        M, K, N, rank, dtype, adapter_dtype=adapter_dtype, bias=bias, scaling=scaling,
        dropout_p=dropout_p, seed=seed, generator_seed=generator_seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(generator_seed + 1)
    v = i.weights[0].double() + scaling * i.lora_bs[0].double() @ i.lora_as[0].double()
    drawn = 0.5 + torch.rand(N, generator=generator, dtype=torch.float64)
    return DoraLinearInputs(i, (v.norm(dim=1) * drawn).to(adapter_dtype or dtype))


def dora_linear_results(
    inputs: DoraLinearInputs, dtype: torch.dtype, needs: str = "xwabmc", reverse: bool = False
) -> dict[str, Tensor]:
    """``y`` and ``d<operand>`` by the plain formula; `needs` has the letters x w a b m c(bias).

    `reverse` takes every sum of the products in reverse order.
    """
    i = inputs.plain
    t = {
        name: v.detach().to(dtype).clone().requires_grad_(letter in needs)
        for letter, (name, v) in zip("xwabmc", inputs.operands().items(), strict=False)
    }
    flat = t["x"].reshape(-1, t["x"].shape[-1])
    kept = flat
    if i.dropout_p > 0.0:
        mask = keep_mask(torch.tensor(i.seed), len(flat), flat.shape[1], i.dropout_p)
        kept = flat * mask.to(dtype) * keep_scale(i.dropout_p)
    v = t["weight"] + i.scalings[0] * (t["lora_b"] @ t["lora_a"])
    norm = v.detach().norm(dim=1)
    p, rest = _mm_nt(kept, v, reverse), _mm_nt(flat - kept, t["weight"], reverse)
    y = rest + p * (t["magnitude"] / norm)
    if "bias" in t:
        y = y + t["bias"]
    y = y.reshape(*t["x"].shape[:-1], -1)
    if needs:
        y.backward(i.dys[0].to(dtype))
    return {"y": y.detach()} | {f"d{n}": v.grad for n, v in t.items() if v.grad is not None}


def _mm_nt(a: Tensor, b: Tensor, reverse: bool) -> Tensor:
    """a b^T; reversed in all three axes so that its gradients are summed in reverse as well."""
    return (a.flip(0, 1) @ b.flip(0, 1).t()).flip(0, 1) if reverse else a @ b.t()


def dora_linear_op(
    inputs: DoraLinearInputs, backend: str | None, needs: str = "xwabmc"
) -> dict[str, Tensor]:
    """The same from the op."""
    i = inputs.plain
    t = {
        name: v.detach().requires_grad_(letter in needs)
        for letter, (name, v) in zip("xwabmc", inputs.operands().items(), strict=False)
    }
    bias = t.pop("bias", None)
    y = dora_linear(
        **t, scaling=i.scalings[0], bias=bias, dropout_p=i.dropout_p, seed=i.seed, backend=backend
    )
    if needs:
        y.backward(i.dys[0].to(y.dtype))
    if bias is not None:
        t["bias"] = bias
    return {"y": y.detach()} | {f"d{n}": v.grad for n, v in t.items() if v.grad is not None}


def check_dora_linear(
    inputs: DoraLinearInputs, backend: str | None, needs: str = "xwabmc"
) -> dict[str, Margin]:
    """The op against oracle and yardstick; raises BudgetExceededError, returns the margins."""
    oracle = dora_linear_results(inputs, torch.float64, needs)
    dtype = inputs.plain.x.dtype
    lows = [dora_linear_results(inputs, dtype, needs, reverse=r) for r in (False, True)]
    margins = {}
    for name, got in dora_linear_op(inputs, backend, needs).items():
        exact = oracle[name]
        first, second = (low[name] for low in lows)
        worse = (first.double() - exact).abs() >= (second.double() - exact).abs()
        low = torch.where(worse, first, second)
        margins[name] = assert_within_budget(got, exact, low, f"{backend}: {name}")
    return margins


def materialised(inputs: DoraLinearInputs) -> Tensor:
    """Y without dropout, through the whole adapted weight in fp64."""
    i = inputs.plain
    t = {name: v.double() for name, v in inputs.operands().items()}
    v = t["weight"] + i.scalings[0] * t["lora_b"] @ t["lora_a"]
    scaled = v * (t["magnitude"] / v.norm(dim=1))[:, None]
    return F.linear(t["x"], scaled, t.get("bias"))
