"""rope on random inputs, held to the budget by plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels.ops.rope.api import rope
from lora_kernels.testing.budget import Margin, assert_within_budget
from lora_kernels.testing.inputs import relayout


@dataclass(frozen=True)
class RopeInputs:
    q: Tensor
    k: Tensor | None
    cos: Tensor
    sin: Tensor
    position_ids: Tensor | None = None
    interleaved: bool = False

    def heads(self) -> dict[str, Tensor]:
        return {"q": self.q} if self.k is None else {"q": self.q, "k": self.k}


def rope_inputs(
    lead: tuple[int, ...] = (2, 9),
    H: int = 4,
    D: int = 16,
    *,
    Hk: int = 2,
    R: int | None = None,
    interleaved: bool = False,
    tables: str = "shared",
    dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    generator_seed: int = 0,
) -> RopeInputs:
    """`lead` is (B, S), or (T,) for packed heads. `tables`: "shared" [S, R], "batch" [B, S, R],
    or "cache" of 50 positions with random position_ids. Hk 0: no k."""
    generator = torch.Generator().manual_seed(generator_seed)
    R = R or D

    def normal(*shape: int) -> Tensor:
        t = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return relayout(t, layout)

    rows = {"shared": lead[-1:], "batch": lead, "cache": (50,)}[tables]
    position_ids = None
    if tables == "cache":
        position_ids = torch.randint(0, 50, lead, generator=generator)
    angle = torch.rand(*rows, R // 2, generator=generator, dtype=torch.float64) * 6.0
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
    return RopeInputs(
        q=normal(*lead, H, D),
        k=normal(*lead, Hk, D) if Hk else None,
        cos=relayout(angle.cos().to(table_dtype), layout),
        sin=relayout(angle.sin().to(table_dtype), layout),
        position_ids=position_ids,
        interleaved=interleaved,
    )


def _formula(i: RopeInputs, x: Tensor, dtype: torch.dtype) -> Tensor:
    cos, sin = i.cos, i.sin
    if i.position_ids is not None:
        cos, sin = cos[i.position_ids], sin[i.position_ids]
    cos, sin = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
    R = cos.shape[-1]
    part, rest = x[..., :R], x[..., R:]
    turned = torch.empty_like(part)
    if i.interleaved:
        turned[..., 0::2], turned[..., 1::2] = -part[..., 1::2], part[..., 0::2]
    else:
        turned = torch.roll(part, R // 2, -1)
        turned = torch.cat([-turned[..., : R // 2], turned[..., R // 2 :]], -1)
    return torch.cat([part * cos + turned * sin, rest], -1)


def _gradients(outs: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for out in outs.values():
        dy = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
        total = total.to(out.device) + (out * dy).double().sum()
    if total.requires_grad:
        total.backward()
    grads = {f"d{n}": t.grad for n, t in leaves.items() if t.grad is not None}
    return {**{n: t.detach() for n, t in outs.items()}, **grads}


def results(i: RopeInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in i.heads().items()}
    return _gradients({n: _formula(i, t, dtype) for n, t in leaves.items()}, leaves)


def rope_op(
    i: RopeInputs, backend: str | None, needs: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """Results and gradients of the op; `needs` names the tensors to differentiate, all when
    None."""
    leaves = {
        n: t.detach().requires_grad_(needs is None or n in needs) for n, t in i.heads().items()
    }
    q, k = rope(
        leaves["q"], leaves.get("k"), i.cos, i.sin,
        interleaved=i.interleaved, position_ids=i.position_ids, backend=backend,
    )  # fmt: skip
    return _gradients({"q": q} if k is None else {"q": q, "k": k}, leaves)


def check_rope(
    i: RopeInputs, backend: str | None, needs: tuple[str, ...] | None = None
) -> dict[str, Margin]:
    """The op against the fp64 formula; raises BudgetExceededError, returns the margins."""
    oracle, low = results(i, torch.float64), results(i, i.q.dtype)
    return {
        name: assert_within_budget(t, oracle[name], low[name], f"{backend}: {name}")
        for name, t in rope_op(i, backend, needs).items()
    }
