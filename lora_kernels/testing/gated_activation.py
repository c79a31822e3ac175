"""gated_activation on random inputs, held to the budget by plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.ops.gated_activation.api import gated_activation
from lora_kernels.testing.budget import Margin, assert_within_budget
from lora_kernels.testing.inputs import relayout


@dataclass(frozen=True)
class GatedActivationInputs:
    gate: Tensor
    up: Tensor | None
    kind: str


def gated_activation_inputs(
    shape: tuple[int, ...] = (17, 40),
    kind: str = "silu",
    *,
    gated: bool = True,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    generator_seed: int = 0,
) -> GatedActivationInputs:
    """gate and up normal with a deviation of 2, so that both tails of the activation are met."""
    generator = torch.Generator().manual_seed(generator_seed)

    def normal() -> Tensor:
        t = 2.0 * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return relayout(t.to(dtype), layout)

    return GatedActivationInputs(normal(), normal() if gated else None, kind)


def formula(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    if kind == "silu":
        h = F.silu(gate)
    elif kind == "relu":
        h = F.relu(gate)
    elif kind == "relu_squared":
        h = F.relu(gate).square()
    else:
        h = F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    return h if up is None else h * up


def _gradients(h: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    dh = torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h.dtype)
    if h.requires_grad:
        h.backward(dh)
    grads = {f"d{n}": t.grad for n, t in leaves.items() if t.grad is not None}
    return {"h": h.detach(), **grads}


def _leaves(i: GatedActivationInputs, dtype: torch.dtype, needs: object) -> dict[str, Tensor]:
    named = {"gate": i.gate} if i.up is None else {"gate": i.gate, "up": i.up}
    return {
        n: t.detach().to(dtype).requires_grad_(needs is None or n in needs)  # type: ignore[operator]
        for n, t in named.items()
    }


def results(i: GatedActivationInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = _leaves(i, dtype, None)
    return _gradients(formula(leaves["gate"], leaves.get("up"), i.kind), leaves)


def gated_activation_op(
    i: GatedActivationInputs, backend: str | None, needs: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """Result and gradients of the op; `needs` names the tensors to differentiate, all when
    None."""
    leaves = _leaves(i, i.gate.dtype, needs)
    h = gated_activation(leaves["gate"], leaves.get("up"), i.kind, backend=backend)
    return _gradients(h, leaves)


def check_gated_activation(
    i: GatedActivationInputs, backend: str | None, needs: tuple[str, ...] | None = None
) -> dict[str, Margin]:
    """The op against the fp64 formula; raises BudgetExceededError, returns the margins."""
    oracle, low = results(i, torch.float64), results(i, i.gate.dtype)
    return {
        name: assert_within_budget(t, oracle[name], low[name], f"{backend}: {name}")
        for name, t in gated_activation_op(i, backend, needs).items()
    }
