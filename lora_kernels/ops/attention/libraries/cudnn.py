"""cuDNN's attention as torch has it: aten::_scaled_dot_product_cudnn_attention and its backward.

q [B, H, S, D] as a view of our layout; causal only where there are as many queries as keys. lse is
natural, [B, H, S] or with an axis of 1 behind, as the release of torch has it; the backward gets
what the forward gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops.attention.libraries import form
from lora_kernels.ops.attention.libraries.here import Device
from lora_kernels.ops.attention.operands import Operands
from lora_kernels.ops.attention.problem import AttentionProblem

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
MAX_HEAD = 128
LEAST_VERSION = 91501  # below, lengths that 128 does not divide go wrong
_axes: list[int] = []  # of the log-sum-exp, once a forward has shown them


def limits(problem: AttentionProblem, direction: str, here: Device) -> str:
    if here.hip:
        return "torch for AMD has no cuDNN"
    if here.arch[0] not in (9, 10):
        return f"for compute capability 9.x and 10.x, this is {here.arch[0]}.{here.arch[1]}"
    version = torch.backends.cudnn.version() or 0
    if version < LEAST_VERSION:
        return f"needs cuDNN {LEAST_VERSION}, this is {version}"
    if max(problem.D, problem.Dv) > MAX_HEAD:
        return f"heads are larger than {MAX_HEAD}"
    if problem.Sk == 1:
        return "cuDNN takes no single key"
    return ""


def _operands(d: Operands) -> tuple[Tensor, ...]:
    every = (form.rows(t, form.round_up(t.shape[-1], 8)) for t in (d.q, d.k, d.v))
    return tuple(t.transpose(1, 2) for t in every)


def _causal(d: Operands) -> bool:
    return form.reach(d, None)[1] == 0


def forward(d: Operands, p: form.Packing | None) -> tuple[Tensor, Tensor]:
    q, k, v = _operands(d)
    out, lse, *_ = _forward(q, k, v, None, True, 0.0, _causal(d), False, scale=d.scale)
    _axes[:] = [lse.dim()]
    return out.transpose(1, 2), lse.reshape(q.shape[:3])


def backward(
    dout: Tensor, dlse: Tensor | None, d: Operands, p: form.Packing | None, out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, their heads padded as the kernel has them."""
    if not _axes:
        forward(d, p)
    q, k, v = _operands(d)
    size = form.round_up(d.v.shape[-1], 8)
    dout, out = (form.rows(t, size).transpose(1, 2) for t in (dout, out))
    lse = form.closed(lse)
    state = torch.zeros(
        (), dtype=torch.int64, device=q.device
    )  # of dropout, of which there is none
    grads = _backward(
        dout, q, k, v, out, lse if _axes == [3] else lse.unsqueeze(-1), state, state, None, None,
        None, q.shape[2], k.shape[2], 0.0, _causal(d), scale=d.scale,
    )  # fmt: skip
    return tuple(g.transpose(1, 2) for g in grads)
