"""Memory-efficient attention as torch has it: aten::_efficient_attention_forward and backward.

q [B, S, H, D], k and v with as many heads; causal aligned bottom-right (mask type 2), alone or
with a bias of [B, H, S, Sk] in the dtype of q whose rows are 16 bytes wide. lse is [B, H, S
rounded up to 32], natural. A row that sees nothing is told by the mask, not by the kernel.
With one split of the keys the backward adds without atomics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.ops.attention.libraries import form
from lora_kernels.ops.attention.libraries.here import Device, unknown_arguments
from lora_kernels.ops.attention.operands import Operands
from lora_kernels.ops.attention.problem import AttentionProblem

_forward = torch.ops.aten._efficient_attention_forward.default
_backward = torch.ops.aten._efficient_attention_backward.default
_NO_MASK, _BOTTOM_RIGHT = 0, 2
_LSE_ROWS = 32
_BIAS_COLUMNS = 16


def limits(problem: AttentionProblem, direction: str, here: Device) -> str:
    if here.hip:
        return "not mapped to torch's kernels for AMD"
    if problem.dtype == torch.bfloat16 and here.arch < (8, 0):
        return f"bf16 needs compute capability 8.0, this is {here.arch[0]}.{here.arch[1]}"
    if direction == "fwd":
        return unknown_arguments(_forward, ("scale",))
    return unknown_arguments(_backward, ("scale", "num_splits_key"))


def _heads(t: Tensor) -> Tensor:
    return form.rows(t, form.round_up(t.shape[-1], form.ROW_BYTES // t.element_size()))


def _operands(d: Operands) -> tuple[Tensor, ...]:
    """q, k, v; every query head with keys and values of its own."""
    group = d.q.shape[2] // d.k.shape[2]
    k, v = (t if group == 1 else t.repeat_interleave(group, 2) for t in (d.k, d.v))
    return _heads(d.q), _heads(k), _heads(v)


def _causal(d: Operands) -> bool:
    return form.reach(d, None)[1] == 0


def _bias(d: Operands) -> Tensor | None:
    """[B, H, S, Sk], a mask's own extents expanded, its rows in memory a multiple of 16 apart."""
    mask, keys = d.mask, d.k.shape[1]
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=d.q.dtype, device=mask.device)
        mask = zero.masked_fill(~mask, -torch.inf)
    mask = mask.expand(*mask.shape[:3], keys)
    wide = F.pad(mask, (0, form.round_up(keys, _BIAS_COLUMNS) - keys)).contiguous()
    return wide[..., :keys].expand(d.q.shape[0], d.q.shape[2], d.q.shape[1], keys)


def _blind(d: Operands) -> Tensor | None:
    """Broadcast to [B, H, S]: rows without a key that they see; None where there can be none."""
    rows, keys, causal = d.q.shape[1], d.k.shape[1], _causal(d)
    at = torch.arange(rows, device=d.q.device) + keys - rows
    if d.mask is None:
        return at < 0 if causal and rows > keys else None
    seen = d.mask if d.mask.dtype == torch.bool else d.mask != -torch.inf
    blind = ~seen.any(-1)
    if causal:  # the first key that the mask shows has to lie at or before the query
        first = seen.to(torch.uint8).argmax(-1)
        blind = blind | (first > at)
    return blind


def forward(d: Operands, p: form.Packing | None) -> tuple[Tensor, Tensor]:
    q, k, v = _operands(d)
    kind = _BOTTOM_RIGHT if _causal(d) else _NO_MASK
    out, lse, *_ = _forward(
        q, k, v, _bias(d), None, None, None, None, 0.0, kind, True, scale=d.scale
    )
    lse, blind = lse[..., : d.q.shape[1]], _blind(d)
    if blind is not None:
        out = out.masked_fill(blind.expand(lse.shape).transpose(1, 2).unsqueeze(-1), 0.0)
        lse = lse.masked_fill(blind, -torch.inf)
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, d: Operands, p: form.Packing | None, out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; those of a group's heads are added in fp32."""
    q, k, v = _operands(d)
    rows, keys, groups = d.q.shape[1], d.k.shape[1], d.k.shape[2]
    kind = _BOTTOM_RIGHT if _causal(d) else _NO_MASK
    wide = F.pad(form.closed(lse), (0, form.round_up(rows, _LSE_ROWS) - rows), value=torch.inf)
    state = torch.zeros(
        (), dtype=torch.int64, device=q.device
    )  # of dropout, of which there is none
    dq, dk, dv, _ = _backward(
        _heads(dout), q, k, v, _bias(d), _heads(out), None, None, rows, keys, wide, 0.0, state,
        state, kind, False, scale=d.scale, num_splits_key=1 if d.deterministic else None,
    )  # fmt: skip
    if groups != d.q.shape[2]:
        dk, dv = (t.unflatten(2, (groups, -1)).sum(3, dtype=d.wide) for t in (dk, dv))
    return dq, dk, dv
