"""Oracle of attention: the formulas, in plain PyTorch, scores and all.

With q_i, k_j [D], v_j [Dv] of a head, o = Sk - S (so the last query stands at the last key),
scale s, softcap c, ALiBi slope a, window (l, r), mask b, sink t:

    z_ij = s q_i k_j, then c tanh(z / c) where there is a softcap
    z_ij = z_ij - a |i + o - j| + b_ij              additive mask
    z_ij = -inf     where j < i + o - l, j > i + o + r, or a boolean mask is False
    lse_i = log(e^t + sum_j e^z_ij)                 without the sink's term where there is none
    p_ij = e^(z_ij - lse_i)                         0 in a row where every term is 0
    O_i  = sum_j p_ij w_ij v_j                      w = keep / (1 - p) with dropout, else 1

    delta_i = sum_j p_ij w_ij (dO_i v_j) - dlse_i
    dz_ij = p_ij (w_ij dO_i v_j - delta_i)          db = dz,  times 1 - (tanh)^2 below a softcap
    dq_i = s sum_j dz_ij k_j     dk_j = s sum_i dz_ij q_i     dv_j = sum_i p_ij w_ij dO_i
    dt   = -sum_i e^(t - lse_i) delta_i

causal is r = 0. Everything is computed in fp32 (fp64 for fp64) and rounded once.
Sources: softcap as in Gemma 2 (arXiv 2408.00118, section 2), sinks as in gpt-oss (arXiv
2508.10925, section 2.2), ALiBi: Press et al. 2022, arXiv 2108.12409.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops import _philox


class _Weights(NamedTuple):
    """Of one dense problem, heads first: probabilities [B, H, S, Sk] and what made them."""

    p: Tensor
    sink: Tensor  # the sink's probability [B, H, S, 1], or no column
    dropped: Tensor  # w
    cap: Tensor  # d(z after softcap) / d(z before)
    lse: Tensor  # [B, H, S]
    q: Tensor
    k: Tensor  # of every query head
    v: Tensor


def _wide(t: Tensor) -> Tensor:
    return t.double() if t.dtype == torch.float64 else t.float()


def _visible(rows: int, keys: int, window: tuple[int, int], device: torch.device) -> Tensor:
    i = torch.arange(rows, device=device).unsqueeze(1) + (keys - rows)
    j = torch.arange(keys, device=device)
    seen = torch.ones(rows, keys, dtype=torch.bool, device=device)
    if window[0] >= 0:
        seen &= j >= i - window[0]
    if window[1] >= 0:
        seen &= j <= i + window[1]
    return seen


def _weights(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Tensor | None,
    slopes: Tensor | None, seed: Tensor | None, scale: float, window: tuple[int, int],
    softcap: float, dropout_p: float, first_stream: int,
) -> _Weights:  # fmt: skip
    group = q.shape[2] // k.shape[2]
    q = _wide(q).transpose(1, 2)
    k, v = (_wide(t).transpose(1, 2).repeat_interleave(group, 1) for t in (k, v))
    rows, keys = q.shape[2], k.shape[2]
    z = scale * (q @ k.mT)
    cap = torch.ones_like(z)
    if softcap != 0.0:
        t = torch.tanh(z / softcap)
        z, cap = softcap * t, 1.0 - t * t
    if slopes is not None:
        i = torch.arange(rows, device=q.device).unsqueeze(1) + (keys - rows)
        distance = (i - torch.arange(keys, device=q.device)).abs().to(z.dtype)
        z = z - slopes.to(z.dtype)[:, :, None, None] * distance
    if mask is not None and mask.dtype == torch.bool:
        z = z.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        z = z + mask.to(z.dtype)
    z = z.masked_fill(~_visible(rows, keys, window, q.device), -torch.inf)
    terms = z
    if sinks is not None:
        term = sinks.to(z.dtype).view(1, -1, 1, 1).expand(*z.shape[:3], 1)
        terms = torch.cat([z, term], -1)
    if terms.shape[-1] == 0:
        lse = z.new_full(z.shape[:3], -torch.inf)
    else:
        lse = torch.logsumexp(terms, -1)
    empty = (lse == -torch.inf).unsqueeze(-1)
    every = terms.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    p, sink = every[..., :keys], every[..., keys:]
    dropped = torch.ones_like(p)
    if dropout_p != 0.0 and seed is not None and p.numel():
        streams = range(first_stream, first_stream + p.shape[0] * p.shape[1])
        seed = seed.to(q.device)
        kept = [_philox.keep_mask(seed, rows, keys, dropout_p, stream) for stream in streams]
        dropped = torch.stack(kept).view(p.shape).to(p.dtype) * _philox.keep_scale(dropout_p)
    return _Weights(p, sink, dropped, cap, lse, q, k, v)


def _spans(cu_seqlens: Tensor) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(cu_seqlens.tolist())]


def _row(slopes: Tensor | None, b: int) -> Tensor | None:
    return slopes if slopes is None or slopes.shape[0] == 1 else slopes[b : b + 1]


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, attn_mask: Tensor | None,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, alibi_slopes: Tensor | None,
    seed: Tensor | None, scale: float, window: tuple[int, int], softcap: float, dropout_p: float,
    deterministic: bool, first_stream: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, S, H, Dv] in the dtype of q, lse [B, H, S]); packed: [T, H, Dv] and [H, T]."""
    options = (scale, window, softcap, dropout_p)
    if cu_seqlens is not None and cu_seqlens_k is not None:
        parts = []
        pairs = zip(_spans(cu_seqlens), _spans(cu_seqlens_k), strict=True)
        for b, (rows, keys) in enumerate(pairs):
            parts.append(
                attention_fwd(
                    q[None, rows], k[None, keys], v[None, keys], sinks, None, None, None,
                    _row(alibi_slopes, b), seed, *options, deterministic, b * q.shape[1],
                )
            )  # fmt: skip
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 1)[0], torch.cat(lses, 2)[0]
    w = _weights(q, k, v, sinks, attn_mask, alibi_slopes, seed, *options, first_stream)
    out = (w.p * w.dropped) @ w.v
    return out.transpose(1, 2).to(q.dtype).contiguous(), w.lse


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    sinks: Tensor | None, attn_mask: Tensor | None, cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None, alibi_slopes: Tensor | None, seed: Tensor | None, scale: float,
    window: tuple[int, int], softcap: float, dropout_p: float, deterministic: bool,
    needs: list[bool], first_stream: int = 0,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, sinks and attn_mask; None where `needs` does not ask."""
    options = (scale, window, softcap, dropout_p)
    if cu_seqlens is not None and cu_seqlens_k is not None:
        parts: list[list[Any]] = []
        pairs = zip(_spans(cu_seqlens), _spans(cu_seqlens_k), strict=True)
        for b, (rows, keys) in enumerate(pairs):
            parts.append(
                attention_bwd(
                    dout[None, rows], None if dlse is None else dlse[None, :, rows],
                    out[None, rows], lse[None, :, rows], q[None, rows], k[None, keys],
                    v[None, keys], sinks, None, None, None, _row(alibi_slopes, b), seed,
                    *options, deterministic, needs, b * q.shape[1],
                )
            )  # fmt: skip
        joined = [torch.cat([part[n] for part in parts], 1)[0] for n in range(3)]
        return [*joined, sum(part[3] for part in parts) if needs[3] else None, None]
    w = _weights(q, k, v, sinks, attn_mask, alibi_slopes, seed, *options, first_stream)
    do = _wide(dout).transpose(1, 2)
    weighted = w.p * w.dropped
    dp = w.dropped * (do @ w.v.mT)
    delta = (w.p * dp).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    dz = w.p * (dp - delta.unsqueeze(-1))
    dmask = dz.sum_to_size(attn_mask.shape) if needs[4] and attn_mask is not None else None
    dz = dz * w.cap
    dq = scale * (dz @ w.k)

    def of_group(g: Tensor, owner: Tensor) -> Tensor:
        groups = owner.shape[2]
        return g.unflatten(1, (groups, g.shape[1] // groups)).sum(2).transpose(1, 2).to(owner.dtype)

    dsinks = None
    if needs[3] and sinks is not None:
        dsinks = -(w.sink.squeeze(-1) * delta).sum((0, 2))
    return [
        dq.transpose(1, 2).to(q.dtype),
        of_group(scale * (dz.mT @ w.q), k),
        of_group(weighted.mT @ do, v),
        dsinks,
        dmask,
    ]
