"""linear_cross_entropy on random inputs, held to the budget by plain PyTorch with all logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.ops.linear_cross_entropy.api import linear_cross_entropy
from lora_kernels.testing.budget import Margin, assert_within_budget
from lora_kernels.testing.inputs import relayout

IGNORED = -100


@dataclass(frozen=True)
class LinearCrossEntropyInputs:
    """Arguments of the op; `options` are its keyword arguments that are not tensors."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None
    bias: Tensor | None
    token_weights: Tensor | None
    options: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        named = {
            "hidden": self.hidden, "weight": self.weight, "lora_a": self.lora_a,
            "lora_b": self.lora_b, "bias": self.bias,
        }  # fmt: skip
        return {name: t for name, t in named.items() if t is not None}


def linear_cross_entropy_inputs(
    lead: tuple[int, ...] = (2, 9),
    K: int = 20,
    V: int = 67,
    rank: int = 3,
    dtype: torch.dtype = torch.float32,
    *,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    weighted: bool = False,
    ignored: float = 0.2,
    layout: str = "contiguous",
    generator_seed: int = 0,
    **options: Any,
) -> LinearCrossEntropyInputs:
    """Frozen logits, update and bias of similar size, so that each of them shows in the loss;
    `ignored` is the share of labels that do not count. `rank` 0: no adapter."""
    generator = torch.Generator().manual_seed(generator_seed)

    def normal(*shape: int, std: float = 1.0, kind: torch.dtype | None = None) -> Tensor:
        t = torch.randn(*shape, generator=generator, dtype=torch.float64) * std
        return relayout(t.to(kind or dtype), layout)

    labels = torch.randint(0, V, lead, generator=generator)
    unused = torch.rand(lead, generator=generator) < ignored
    scaling = options.setdefault("scaling", 0.7)
    update = (K * rank) ** -0.5 / scaling if rank else 0.0
    return LinearCrossEntropyInputs(
        hidden=normal(*lead, K),
        weight=normal(V, K, std=2.0 * K**-0.5),
        labels=labels.masked_fill(unused, options.get("ignore_index", IGNORED)),
        lora_a=normal(rank, K, kind=adapter_dtype) if rank else None,
        lora_b=normal(V, rank, std=2.0 * update, kind=adapter_dtype) if rank else None,
        bias=normal(V) if bias else None,
        token_weights=torch.rand(lead, generator=generator).to(dtype) if weighted else None,
        options=options,
    )


def formula(i: LinearCrossEntropyInputs, named: dict[str, Tensor]) -> Tensor:
    """All logits and torch's own cross entropy."""
    o = i.options
    z = named["hidden"] @ named["weight"].t()
    if "bias" in named:
        z = z + named["bias"]
    if "lora_a" in named:
        z = z + o["scaling"] * ((named["hidden"] @ named["lora_a"].t()) @ named["lora_b"].t())
    z = z if z.dtype == torch.float64 else z.float()
    if o.get("softcap"):
        z = o["softcap"] * torch.tanh(z / o["softcap"])
    labels, ignore = i.labels, o.get("ignore_index", IGNORED)
    weights = torch.ones_like(labels) if i.token_weights is None else i.token_weights
    weights = weights.to(z.dtype)
    if o.get("shift"):
        labels = F.pad(labels, (0, 1), value=ignore)[..., 1:]
        weights = F.pad(weights, (0, 1))[..., 1:]
    z, labels, weights = z.flatten(0, -2), labels.flatten(), weights.flatten()
    losses = F.cross_entropy(
        z, labels, reduction="none", ignore_index=ignore,
        label_smoothing=o.get("label_smoothing", 0.0),
    )  # fmt: skip
    valid = labels != ignore
    losses = losses + o.get("z_loss", 0.0) * torch.logsumexp(z, 1).square() * valid
    losses = losses * weights
    reduction = o.get("reduction", "mean")
    if reduction == "none":
        return losses.view(i.labels.shape)
    return losses.sum() / ((weights * valid).sum() if reduction == "mean" else 1.0)


def results(i: LinearCrossEntropyInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss and gradients of the formula with every tensor converted to `dtype`."""
    named = {n: t.detach().to(dtype).requires_grad_() for n, t in i.tensors().items()}
    return _with_gradients(i, formula(i, named), named)


def yardstick(i: LinearCrossEntropyInputs, oracle: dict[str, Tensor]) -> dict[str, Tensor]:
    """What plain PyTorch gives in the dtype of hidden, each element the worse of two orders of
    summation over K, as one alone may be lucky. A loss of rounded logits is rounded like them."""
    dtype = i.hidden.dtype
    axes = {"hidden": (-1,), "weight": (1,), "lora_a": (0, 1), "lora_b": (1,), "bias": ()}
    flipped: dict[str, Any] = {n: t.flip(axes[n]) for n, t in i.tensors().items()}
    plain, reverse = results(i, dtype), results(replace(i, **flipped), dtype)
    worse = {}
    for name, first in plain.items():
        second, exact = reverse[name].flip(axes.get(name[1:], ())), oracle[name]
        farther = (first.double() - exact).abs() >= (second.double() - exact).abs()
        worse[name] = torch.where(farther, first, second)
    worse["loss"] = worse["loss"].to(dtype)
    return worse


def _with_gradients(
    i: LinearCrossEntropyInputs, loss: Tensor, named: dict[str, Tensor]
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    upstream = torch.rand(loss.shape, generator=generator, dtype=torch.float64).to(loss)
    loss.backward(upstream)
    grads = {f"d{n}": t.grad for n, t in named.items() if t.grad is not None}
    return {"loss": loss.detach(), **grads}


def linear_cross_entropy_op(
    i: LinearCrossEntropyInputs, backend: str | None, needs: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """Loss and gradients of the op; `needs` names the tensors to differentiate, all when None."""
    named = {
        n: t.detach().requires_grad_(needs is None or n in needs) for n, t in i.tensors().items()
    }
    rest: dict[str, Any] = {n: t for n, t in named.items() if n not in ("hidden", "weight")}
    loss = linear_cross_entropy(
        named["hidden"], named["weight"], i.labels,
        token_weights=i.token_weights, backend=backend, **rest, **i.options,
    )  # fmt: skip
    if not loss.requires_grad:
        return {"loss": loss}
    return _with_gradients(i, loss, named)


def check_linear_cross_entropy(
    i: LinearCrossEntropyInputs, backend: str | None, needs: tuple[str, ...] | None = None
) -> dict[str, Margin]:
    """The op against the fp64 formula; raises BudgetExceededError, returns the margins."""
    oracle = results(i, torch.float64)
    low = yardstick(i, oracle)
    return {
        name: assert_within_budget(t, oracle[name], low[name], f"{backend}: {name}")
        for name, t in linear_cross_entropy_op(i, backend, needs).items()
    }
