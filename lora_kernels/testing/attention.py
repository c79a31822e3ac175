"""attention on random inputs, held to the budget by plain PyTorch with all scores."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.ops import _philox
from lora_kernels.ops.attention.api import attention
from lora_kernels.testing.budget import (
    FACTOR,
    BudgetExceededError,
    Margin,
    assert_within_budget,
)
from lora_kernels.testing.inputs import relayout

GRADIENT_FACTOR = 3.0  # FlashAttention's rule: output 2, gradients 3
DIFFERENTIABLE = ("q", "k", "v", "sinks", "attn_mask")


@dataclass(frozen=True)
class AttentionInputs:
    """Arguments of the op; `options` are its keyword arguments that are not tensors."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None = None
    attn_mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that can have a gradient."""
        named = {name: getattr(self, name) for name in DIFFERENTIABLE}
        return {n: t for n, t in named.items() if t is not None and t.is_floating_point()}

    def constants(self) -> dict[str, Any]:
        names = ("attn_mask", "alibi_slopes", "cu_seqlens", "cu_seqlens_k")
        named = {name: getattr(self, name) for name in names}
        return {n: t for n, t in named.items() if t is not None and n not in self.leaves()}


def attention_inputs(
    B: int = 2,
    S: int = 9,
    H: int = 4,
    D: int = 16,
    *,
    Sk: int | None = None,
    Hk: int | None = None,
    Dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    sinks: bool = False,
    mask: str = "",
    mask_shape: Sequence[int] | None = None,
    alibi: bool = False,
    layout: str = "contiguous",
    generator_seed: int = 0,
    **options: Any,
) -> AttentionInputs:
    """Scores spread over several units, and sinks, biases and slopes of the same size, so that
    each of them shows. `lengths` packs sequences of these lengths, with `key_lengths` where keys
    differ; `mask` is "bool" or "additive", of `mask_shape` or [B, H, S, Sk]. A boolean mask hides
    the whole of a row here and there."""
    generator = torch.Generator().manual_seed(generator_seed)
    Sk, Hk, Dv = Sk if Sk is not None else S, Hk or H, Dv or D
    packed: dict[str, Any] = {}
    rows: tuple[int, ...] = (B, S)
    keys: tuple[int, ...] = (B, Sk)
    if lengths is not None:
        key_lengths = key_lengths or lengths
        rows, keys = (sum(lengths),), (sum(key_lengths),)
        packed = {"cu_seqlens": _ends(lengths)}
        if key_lengths is not lengths:
            packed["cu_seqlens_k"] = _ends(key_lengths)

    def normal(*shape: int, std: float = 1.0, kind: torch.dtype | None = None) -> Tensor:
        t = torch.randn(*shape, generator=generator, dtype=torch.float64) * std
        return relayout(t.to(kind or dtype), layout)

    shape = tuple(mask_shape or (B, H, S, Sk))
    attn_mask = None
    if mask == "bool":
        attn_mask = torch.rand(shape, generator=generator) < 0.7
        attn_mask &= torch.rand((*shape[:-1], 1), generator=generator) < 0.85
    elif mask == "additive":
        attn_mask = normal(*shape).masked_fill(
            torch.rand(shape, generator=generator) < 0.1, -torch.inf
        )
    return AttentionInputs(
        q=normal(*rows, H, D, std=1.5),
        k=normal(*keys, Hk, D),
        v=normal(*keys, Hk, Dv),
        sinks=normal(H) + 1.0 if sinks else None,
        attn_mask=attn_mask,
        alibi_slopes=torch.linspace(0.1, 0.6, H) if alibi else None,
        options=options,
        **packed,
    )


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def formula(
    i: AttentionInputs, named: dict[str, Tensor], reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """(out, lse) by matmul and softmax in the dtype of `named`; `reverse` sums the other way."""
    if i.cu_seqlens is None:
        mask = named.get("attn_mask", i.attn_mask)
        return _dense(i, named, mask, i.alibi_slopes, 0, reverse)
    outs, lses = [], []
    ends_k = i.cu_seqlens if i.cu_seqlens_k is None else i.cu_seqlens_k
    pairs = [itertools.pairwise(t.tolist()) for t in (i.cu_seqlens, ends_k)]
    for b, (rows, keys) in enumerate(zip(*pairs, strict=True)):
        part = dict(named)
        part["q"] = named["q"][None, slice(*rows)]
        part["k"], part["v"] = named["k"][None, slice(*keys)], named["v"][None, slice(*keys)]
        slopes = i.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        out, lse = _dense(i, part, None, slopes, b * named["q"].shape[1], reverse)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def scores(
    i: AttentionInputs, named: dict[str, Tensor], mask: Tensor | None, slopes: Tensor | None,
    reverse: bool = False,
) -> Tensor:  # fmt: skip
    """[B, H, S, Sk] with every bias and mask, sinks apart."""
    o = i.options
    q, k = (named[name].transpose(1, 2) for name in ("q", "k"))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    if reverse:
        q, k = q.flip(-1), k.flip(-1)
    (rows, depth), keys = q.shape[2:], k.shape[2]
    scale = o.get("scale")
    z = (q @ k.mT) * (depth**-0.5 if scale is None else scale)
    if o.get("softcap"):
        z = o["softcap"] * torch.tanh(z / o["softcap"])
    at = torch.arange(max(rows, keys), device=q.device)
    distance = at[None, :keys] - at[:rows, None] - (keys - rows)
    if slopes is not None:
        slopes = slopes if slopes.dim() == 2 else slopes[None]
        z = z - (slopes.double()[:, :, None, None] * distance.abs()).to(z.dtype)
    if mask is not None and mask.dtype != torch.bool:
        z = z + mask
    seen = torch.ones(rows, keys, dtype=torch.bool, device=q.device)
    left, right = o.get("window") or (-1, -1)
    if o.get("causal"):
        right = 0
    if left >= 0:
        seen = seen & (distance >= -left)
    if right >= 0:
        seen = seen & (distance <= right)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    return z.masked_fill(~seen, -torch.inf)


def _dense(
    i: AttentionInputs, named: dict[str, Tensor], mask: Tensor | None, slopes: Tensor | None,
    first_stream: int, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    z = scores(i, named, mask, slopes, reverse)
    v = named["v"].transpose(1, 2).repeat_interleave(z.shape[1] // named["v"].shape[2], 1)
    (rows, keys), o = z.shape[2:], i.options
    if "sinks" in named:
        sink = named["sinks"].to(z.dtype).view(1, -1, 1, 1).expand(*z.shape[:3], 1)
        z = torch.cat([z, sink], -1)
    empty = (z == -torch.inf).all(-1, keepdim=True)
    filled = z.masked_fill(empty, 0.0)
    lse = filled.logsumexp(-1) if z.shape[-1] else filled.new_zeros(z.shape[:-1])
    p = filled.softmax(-1).masked_fill(empty, 0.0)[..., :keys]
    if o.get("dropout_p"):
        seed, streams = torch.tensor(o["seed"], device=p.device), range(p.shape[0] * p.shape[1])
        kept = [
            _philox.keep_mask(seed, rows, keys, o["dropout_p"], first_stream + s) for s in streams
        ]
        p = p * torch.stack(kept).view(p.shape) * _philox.keep_scale(o["dropout_p"])
    p = p.to(v.dtype)
    out = p.flip(-1) @ v.flip(2) if reverse else p @ v
    return out.transpose(1, 2), lse.masked_fill(empty.squeeze(-1), -torch.inf)


def results(i: AttentionInputs, dtype: torch.dtype, reverse: bool = False) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients of the formula, every tensor converted to `dtype`."""
    named = {n: t.detach().to(dtype).requires_grad_() for n, t in i.leaves().items()}
    return _with_gradients(i, *formula(i, named, reverse), named)


def yardstick(i: AttentionInputs, oracle: dict[str, Tensor]) -> dict[str, Tensor]:
    """What plain PyTorch gives in the dtype of q, each element the worst of two orders of
    summation, as one alone may be lucky, and of PyTorch's own attention kernel: its exponential
    in fp32 now and then errs four times as much as the formula's."""
    every = [results(i, i.q.dtype, order) for order in (False, True)]
    every += [_library_results(i)]
    worst = dict(every[0])
    for other in every[1:]:
        for name, second in other.items():
            first, exact = worst[name], oracle[name]
            farther = (first.double() - exact).abs() >= (second.double() - exact).abs()
            worst[name] = torch.where(farther, first, second)
    return worst


def _library_results(i: AttentionInputs) -> dict[str, Tensor]:
    """Output and gradients of q, k, v by scaled_dot_product_attention, every bias as its mask and
    a sink as one more key; empty where it cannot compute the same."""
    o = i.options
    packed = i.cu_seqlens is not None
    if packed or any(o.get(name) for name in ("softcap", "dropout_p", "return_lse")):
        return {}
    named = {n: getattr(i, n).detach().requires_grad_() for n in ("q", "k", "v")}
    q, k, v = (t.transpose(1, 2) for t in named.values())
    bias = q.new_zeros(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    zero = AttentionInputs(i.q, i.k, i.v, options={**o, "scale": 0.0})
    bias = bias + scores(zero, named, i.attn_mask, i.alibi_slopes).detach()
    if i.sinks is not None:
        sink = i.sinks.to(q.dtype).view(1, -1, 1, 1).expand(*bias.shape[:3], 1)
        bias = torch.cat([bias, sink], -1)
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, scale=o.get("scale"), enable_gqa=True
    )
    return {
        name: t
        for name, t in _with_gradients(i, out.transpose(1, 2), out.new_zeros(0), named).items()
        if name != "lse"
    }


def _with_gradients(
    i: AttentionInputs, out: Tensor, lse: Tensor, named: dict[str, Tensor]
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    loss = (out * dout).sum()
    if i.options.get("return_lse"):
        dlse = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(lse)
        loss = loss + (lse * dlse).masked_fill(lse == -torch.inf, 0.0).sum()
    if loss.requires_grad:
        loss.backward()
    grads = {f"d{n}": t.grad for n, t in named.items() if t.grad is not None}
    return {"out": out.detach(), "lse": lse.detach(), **grads}


def attention_op(
    i: AttentionInputs, backend: str | None, needs: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients of the op; `needs` names the tensors to differentiate,
    all when None. The log-sum-exp is differentiated where the inputs ask for return_lse."""
    named: dict[str, Any] = {
        n: t.detach().requires_grad_(needs is None or n in needs) for n, t in i.leaves().items()
    }
    options = {**i.options, "return_lse": True}
    out, lse = attention(**named, **i.constants(), **options, backend=backend)
    return _with_gradients(i, out, lse, named)


def check_attention(
    i: AttentionInputs, backend: str | None, needs: tuple[str, ...] | None = None
) -> dict[str, Margin]:
    """The op against the fp64 formula; raises BudgetExceededError, returns the margins."""
    return compare_attention(i, attention_op(i, backend, needs), str(backend))


def compare_attention(i: AttentionInputs, got: dict[str, Tensor], name: str) -> dict[str, Margin]:
    oracle = results(i, torch.float64)
    low = yardstick(i, oracle)
    nothing = oracle["lse"] == -torch.inf
    if not torch.equal(got["lse"] == -torch.inf, nothing):
        raise BudgetExceededError(f"{name}: lse is -inf for other rows than those without a key")
    for each in (got, oracle, low):
        each["lse"] = each["lse"].masked_fill(nothing, 0.0)
    return {
        key: assert_within_budget(
            t, oracle[key], low[key], f"{name}: {key}",
            GRADIENT_FACTOR if key.startswith("d") else FACTOR,
        )
        for key, t in got.items()
    }  # fmt: skip
