"""One dense problem as the paths of `aten` take it, and packed sequences as a series of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_kernels.ops.attention.problem import AttentionProblem


@dataclass(frozen=True)
class Operands:
    """q [B, S, H, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv], or packed without B; sinks [H]; mask
    4-D, broadcast; slopes [1 or B, H]; `first_stream` is the dropout stream of the first head.
    Every path of ours is deterministic: `deterministic` is for library kernels."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    mask: Tensor | None
    slopes: Tensor | None
    seed: Tensor | None
    scale: float
    window: tuple[int, int]
    softcap: float
    dropout_p: float
    first_stream: int = 0
    deterministic: bool = True

    @property
    def wide(self) -> torch.dtype:
        """What scores and sums are in."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def problem(
        self, mask_gradient: bool = False, lse_gradient: bool = False, sequences: int = 0
    ) -> AttentionProblem:
        """`sequences`: so many are packed, 0 for a batch."""
        mask = self.mask
        return AttentionProblem(
            B=sequences or self.q.shape[0],
            S=self.q.shape[-3],
            H=self.q.shape[-2],
            D=self.q.shape[-1],
            Sk=self.k.shape[-3],
            Hk=self.k.shape[-2],
            Dv=self.v.shape[-1],
            varlen=sequences != 0,
            deterministic=self.deterministic,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks is not None,
            mask="" if mask is None else "bool" if mask.dtype == torch.bool else "additive",
            alibi=self.slopes is not None,
            dropout_p=self.dropout_p,
            mask_gradient=mask_gradient,
            lse_gradient=lse_gradient,
            dtype=self.q.dtype,
            device=self.q.device.type,
        )


def sequences(
    packed: Operands, cu_seqlens: Tensor, cu_seqlens_k: Tensor
) -> Iterator[tuple[Operands, slice, slice]]:
    """(dense problem of one sequence, its rows of q, its rows of k and v); packed tensors are
    [T, heads, D]. Sequence b drops what row b of a batch would."""
    q_ends, k_ends = cu_seqlens.tolist(), cu_seqlens_k.tolist()
    heads = packed.q.shape[1]
    for b in range(len(q_ends) - 1):
        rows, keys = slice(q_ends[b], q_ends[b + 1]), slice(k_ends[b], k_ends[b + 1])
        slopes = packed.slopes
        if slopes is not None and slopes.shape[0] > 1:
            slopes = slopes[b : b + 1]
        part = replace(
            packed,
            q=packed.q[rows].unsqueeze(0),
            k=packed.k[keys].unsqueeze(0),
            v=packed.v[keys].unsqueeze(0),
            slopes=slopes,
            first_stream=b * heads,
        )
        yield part, rows, keys


def row_gradient(dout: Tensor, out: Tensor, dlse: Tensor | None, wide: torch.dtype) -> Tensor:
    """delta = sum_d dO O - dlse, [B, H, S]: what every probability's gradient is less of."""
    delta = (dout.to(wide) * out.to(wide)).sum(-1).transpose(1, 2)
    return delta if dlse is None else delta - dlse.to(wide)


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """-sum over batch and rows of p_sink delta, [H] in the dtype of lse."""
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    p = torch.exp(sinks.to(lse.dtype).view(1, -1, 1) - safe)
    return -(p * delta).sum((0, 2))
