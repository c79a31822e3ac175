"""gated_activation on random inputs, held to the budget by plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.ops.gated_activation.api import gated_activation
from lora_kernels.testing.budget import Margin, assert_within_budget
from lora_kernels.testing.inputs import relayout


@dataclass(frozen=True)
class GatedActivationInputs:
    """`lora_as`: of layers behind the activation; `lora_bs`, `s`, `scalings`: of those before."""

    gate: Tensor
    up: Tensor | None
    kind: str
    lora_as: list[Tensor] = field(default_factory=list)
    lora_bs: list[Tensor] = field(default_factory=list)
    s: Tensor | None = None
    scalings: tuple[float, ...] = ()


def gated_activation_inputs(
    shape: tuple[int, ...] = (17, 40),
    kind: str = "silu",
    *,
    gated: bool = True,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    ranks: tuple[int, ...] = (),
    member_ranks: tuple[int, ...] = (),
    adapter_dtype: torch.dtype | None = None,
    generator_seed: int = 0,
) -> GatedActivationInputs:
    """gate and up normal with a deviation of 2, so that both tails of the activation are met.
    `ranks`: of adapters behind, `member_ranks`: before, one per operand; all of them with values
    of size one."""
    generator = torch.Generator().manual_seed(generator_seed)

    def normal() -> Tensor:
        t = 2.0 * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return relayout(t.to(dtype), layout)

    gate, up = normal(), normal() if gated else None

    def small(*size: int, of: torch.dtype) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(of)

    own, n = adapter_dtype or dtype, shape[-1]
    return GatedActivationInputs(
        gate, up, kind,
        lora_as=[small(r, n, of=own) for r in ranks],
        lora_bs=[small(n, r, of=own) for r in member_ranks],
        s=small(math.prod(shape[:-1]), sum(member_ranks), of=dtype) if member_ranks else None,
        scalings=tuple(0.5 + g for g in range(len(member_ranks))),
    )  # fmt: skip


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


def _leaves(
    i: GatedActivationInputs, dtype: torch.dtype, needs: Collection[str] | None
) -> dict[str, Tensor]:
    named = {"gate": i.gate} if i.up is None else {"gate": i.gate, "up": i.up}
    return {
        n: t.detach().to(dtype).requires_grad_(needs is None or n in needs)
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


def check_adapter_products(
    i: GatedActivationInputs, backend: str, with_db: bool = True
) -> dict[str, Margin]:
    """S, dS and dB of the registered pair against fp64, beside H and the gradients.

    The products are taken of rounded values, so the oracle starts from what the backend rounded.
    """
    ops, dtype = torch.ops.lora_kernels, i.gate.dtype
    gate = i.gate.flatten(0, -2)
    up = None if i.up is None else i.up.flatten(0, -2)
    generator = torch.Generator().manual_seed(1)
    dh = torch.randn(gate.shape, generator=generator, dtype=torch.float64).to(dtype)
    given = i.s if with_db else None
    h, s = ops.gated_activation_fwd(gate, up, i.kind, i.lora_as, backend)
    dgate, dup, ds, dbs = ops.gated_activation_bwd(
        dh, gate, up, i.kind, i.lora_bs, given, i.scalings, backend
    )
    grads = (dgate,) if up is None else (dgate, dup)
    made = {"s": s, "ds": ds} | {f"db{g}": t for g, t in enumerate(dbs)}
    exact = _products(i, h, grads, torch.float64, with_db)
    low = _products(i, h, grads, dtype, with_db)
    assert made.keys() == exact.keys(), (made.keys(), exact.keys())
    margins = {}
    for name, t in made.items():
        if t.shape != exact[name].shape:
            raise AssertionError(f"{name} is {list(t.shape)}, not {list(exact[name].shape)}")
        margins[name] = assert_within_budget(t, exact[name], low[name], f"{backend}: {name}")
    # What surrounds the products is that of a call without them.
    plain_h, _ = ops.gated_activation_fwd(gate, up, i.kind, [], backend)
    plain = ops.gated_activation_bwd(dh, gate, up, i.kind, [], None, [], backend)
    pairs = zip((h, dgate, dup), (plain_h, *plain[:2]), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise AssertionError(f"{backend}: products change the activation or its gradients")
    return margins


def _products(
    i: GatedActivationInputs, h: Tensor, grads: tuple[Tensor, ...], dtype: torch.dtype,
    with_db: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Plain PyTorch in `dtype`; a dB whose B is wider is computed in the dtype of B."""
    none = [h.new_empty(h.shape[0], 0, dtype=dtype)]
    members = list(zip(grads, i.lora_bs, i.scalings, strict=False))  # no members: no adapters
    found = {
        "s": torch.cat(none + [h.to(dtype) @ a.to(dtype).t() for a in i.lora_as], 1),
        "ds": torch.cat(none + [c * (d.to(dtype) @ b.to(dtype)) for d, b, c in members], 1),
    }
    if i.s is None or not with_db:
        return found
    parts = i.s.split([b.shape[1] for b in i.lora_bs], 1)
    for g, ((d, b, c), part) in enumerate(zip(members, parts, strict=True)):
        wide = max(dtype, b.dtype, key=lambda t: t.itemsize)
        found[f"db{g}"] = c * (d.to(wide).t() @ part.to(wide))
    return found
