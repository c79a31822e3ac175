"""lora_qkv on random inputs, held to the budget by plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels.ops._philox import keep_mask, keep_scale
from lora_kernels.ops.lora_qkv.api import lora_qkv
from lora_kernels.testing.budget import Margin, assert_within_budget
from lora_kernels.testing.inputs import LoraLinearInputs, lora_linear_inputs
from lora_kernels.testing.rope import RopeInputs, rope_inputs

FACTOR, GRADIENT_FACTOR = 2.0, 3.0


@dataclass(frozen=True)
class LoraQkvInputs:
    """Projections of x [B, S, K] (packed [T, K]) and the rotation of the first heads of each."""

    linear: LoraLinearInputs
    tables: RopeInputs
    head_dim: int
    rotated: tuple[int, ...]


def lora_qkv_inputs(
    lead: tuple[int, ...] = (2, 5),
    K: int = 24,
    H: int = 3,
    Hk: int = 2,
    D: int = 8,
    *,
    R: int | None = None,
    joint: bool = False,
    rank: int | tuple[int, ...] = 4,
    bias: bool = True,
    interleaved: bool = False,
    tables: str = "shared",
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    layout: str = "contiguous",
) -> LoraQkvInputs:
    """`joint`: one projection in place of three; `tables`, `R` as in rope_inputs."""
    widths = ((H + 2 * Hk) * D,) if joint else (H * D, Hk * D, Hk * D)
    linear = lora_linear_inputs(
        lead, K, widths, rank, dtype, adapter_dtype=adapter_dtype, bias=bias, dropout_p=dropout_p,
        layout=layout,
    )  # fmt: skip
    return LoraQkvInputs(
        linear, rope_inputs(lead, 1, D, Hk=0, R=R, interleaved=interleaved, tables=tables),
        D, (H + Hk,) if joint else (H, Hk, 0),
    )  # fmt: skip


def _turned(i: LoraQkvInputs, y: Tensor) -> Tensor:
    t = i.tables
    cos, sin = t.cos, t.sin
    if t.position_ids is not None:
        cos, sin = cos[t.position_ids], sin[t.position_ids]
    cos, sin = cos.to(y.dtype).unsqueeze(-2), sin.to(y.dtype).unsqueeze(-2)
    R = cos.shape[-1]
    part, rest = y[..., :R], y[..., R:]
    if t.interleaved:
        other = torch.stack([-part[..., 1::2], part[..., 0::2]], -1).flatten(-2)
    else:
        other = torch.cat([-part[..., R // 2 :], part[..., : R // 2]], -1)
    return torch.cat([part * cos + other * sin, rest], -1)


def _leaves(i: LoraQkvInputs, dtype: torch.dtype | None, needs: str) -> dict[str, list[Tensor]]:
    """x, w, a, b and c, the biases, as :func:`lora_kernels.testing.lora_linear_op` names them."""
    n = i.linear
    named = {"x": [n.x], "w": n.weights, "a": n.lora_as, "b": n.lora_bs,
             "c": [t for t in n.biases if t is not None]}  # fmt: skip
    return {
        key: [(t if dtype is None else t.to(dtype)).detach().requires_grad_(key in needs)
              for t in ts]
        for key, ts in named.items()
    }  # fmt: skip


def _named(
    i: LoraQkvInputs, heads: list[Tensor], leaves: dict[str, list[Tensor]], needs: str
) -> dict[str, Tensor]:
    if needs:
        dys = [dy.to(h.dtype).view(h.shape) for dy, h in zip(i.linear.dys, heads, strict=True)]
        torch.autograd.backward(heads, dys)
    found = {f"z[{g}]": h.detach() for g, h in enumerate(heads)}
    for key, ts in leaves.items():
        found |= {f"d{key}[{g}]": t.grad for g, t in enumerate(ts) if t.grad is not None}
    return found


def results(i: LoraQkvInputs, dtype: torch.dtype, needs: str = "xwabc") -> dict[str, Tensor]:
    """The formula and its gradients by autograd, every operand in `dtype`."""
    n, leaves = i.linear, _leaves(i, dtype, needs)
    (x,) = leaves["x"]
    rows = x.flatten(0, -2)
    heads, biases = [], iter(leaves["c"])
    for g, (w, a, b) in enumerate(zip(leaves["w"], leaves["a"], leaves["b"], strict=True)):
        dropped = rows
        if n.dropout_p > 0.0:
            seed = torch.tensor(n.seed, device=x.device)
            mask = keep_mask(seed, rows.shape[0], rows.shape[1], n.dropout_p, g)
            dropped = rows * mask.to(dtype) * keep_scale(n.dropout_p)
        y = rows @ w.t() + n.scalings[g] * (dropped @ a.t() @ b.t())
        if n.biases[g] is not None:
            y = y + next(biases)
        y = y.view(*x.shape[:-1], w.shape[0] // i.head_dim, i.head_dim)
        first, rest = y.tensor_split([i.rotated[g]], -2)
        heads.append(torch.cat([_turned(i, first), rest], -2))
    return _named(i, heads, leaves, needs)


def lora_qkv_op(i: LoraQkvInputs, backend: str | None, needs: str = "xwabc") -> dict[str, Tensor]:
    """Results and gradients of the op; `needs` names what to differentiate."""
    n, leaves, t = i.linear, _leaves(i, None, needs), i.tables
    biases = iter(leaves["c"])
    heads = lora_qkv(
        leaves["x"][0], leaves["w"], leaves["a"], leaves["b"], n.scalings, t.cos, t.sin,
        head_dim=i.head_dim, rotated=i.rotated,
        biases=[None if b is None else next(biases) for b in n.biases],
        interleaved=t.interleaved, position_ids=t.position_ids, dropout_p=n.dropout_p,
        seed=n.seed, backend=backend,
    )  # fmt: skip
    return _named(i, heads, leaves, needs)


def check_lora_qkv(
    i: LoraQkvInputs, backend: str | None, needs: str = "xwabc"
) -> dict[str, Margin]:
    """The op against the fp64 formula; raises BudgetExceededError, returns the margins."""
    oracle, low = results(i, torch.float64, needs), results(i, i.linear.x.dtype, needs)
    got = lora_qkv_op(i, backend, needs)
    assert got.keys() == oracle.keys()
    return {
        name: assert_within_budget(
            t, oracle[name], low[name].to(t.dtype), f"{backend}: {name}",
            FACTOR if name[0] == "z" else GRADIENT_FACTOR,
        )
        for name, t in got.items()
    }  # fmt: skip
