"""A dense problem through torch's SDPA kernel of the CPU, called with its log-sum-exp.

The kernel's operators are used rather than scaled_dot_product_attention because its backward
takes any log-sum-exp: with the sink's term added to it, and the output scaled to match, the same
backward is the gradient with sinks. Its causal mask is top-left, so causal comes here only where
there are as many queries as keys. It reads keys as if their last axis had stride 1, gives a row
without a visible key the log-sum-exp 0, and now and then takes a row with a NaN for such a row; all
three are put right here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops.attention.operands import Operands, row_gradient, sink_gradient

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _heads_first(t: Tensor) -> Tensor:
    t = t.transpose(1, 2)
    return t if t.stride(-1) == 1 else t.contiguous()


def _additive(d: Operands) -> Tensor | None:
    if d.mask is None:
        return None
    mask = d.mask
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=d.wide, device=mask.device)
        mask = zero.masked_fill(~mask, -torch.inf)
    return mask.to(d.wide).contiguous()


def _is_causal(d: Operands) -> bool:
    return "causal" in d.problem().features()


def forward(d: Operands) -> tuple[Tensor, Tensor]:
    """out [B, S, H, D], lse [B, H, S]."""
    q, k, v = (_heads_first(t) for t in (d.q, d.k, d.v))
    mask = _additive(d)
    out, lse = _forward(q, k, v, 0.0, _is_causal(d), attn_mask=mask, scale=d.scale)
    lse = lse.to(d.wide)
    if (lse == 0.0).any():
        nan = (lse == 0.0) & q.isnan().any(-1)
        out, lse = out.masked_fill(nan.unsqueeze(-1), torch.nan), lse.masked_fill(nan, torch.nan)
    if mask is not None:
        lse = lse.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
    if d.sinks is not None:
        total = torch.logaddexp(lse, d.sinks.to(d.wide).view(1, -1, 1))
        share = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0))
        out, lse = (out * share.unsqueeze(-1)).to(out.dtype), total
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def backward(
    dout: Tensor, d: Operands, out: Tensor, lse: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of q, k, v and sinks."""
    q, k, v, do, o = (_heads_first(t) for t in (d.q, d.k, d.v, dout, out))
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    grads = _backward(
        do, q, k, v, o, safe, 0.0, _is_causal(d), attn_mask=_additive(d), scale=d.scale
    )
    dsinks = None
    if needs[3] and d.sinks is not None:
        dsinks = sink_gradient(d.sinks, lse, row_gradient(dout, out, None, d.wide))
    return [*(g.transpose(1, 2) for g in grads), dsinks]
