"""Plain PyTorch versions of the blocks, for any dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.modules.lora_transposed_linear import LoRATransposedLinear
from lora_kernels.modules.quant_linear import QuantLinear
from lora_kernels.testing.gated_activation import formula


def fill(module: nn.Module) -> nn.Module:
    """Adapters whose update is as large as the layer's own output, norms and sinks that count."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("lora_B"):
                p.copy_(0.3 * torch.randn(p.shape, generator=g))
            elif "norm" in name or name == "sinks":
                p.copy_(torch.rand(p.shape, generator=g) + 0.5)
            elif name.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=g))
    return module


def plain_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer with or without adapter, spelled out; its weight dequantized."""
    if isinstance(layer, QuantLinear):
        weight = layer.quant_weight.dequantize(torch.float64).to(x.dtype)
    else:
        weight = layer.weight.to(x.dtype)
        weight = weight.t() if isinstance(layer, LoRATransposedLinear) else weight
    bias = getattr(layer, "bias", None)
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if getattr(layer, "lora_A", None) is not None:
        a, b = layer.lora_A.to(x.dtype), layer.lora_B.to(x.dtype)
        y = y + (x @ a.t()) @ b.t() * layer.scaling
    return y


def plain_mlp(m: lk.LoRAMLP, x: Tensor) -> Tensor:
    up = plain_linear(m.up_proj, x)
    gate = plain_linear(m.gate_proj, x) if m.gated else None
    h = formula(up, None, m.activation) if gate is None else formula(gate, up, m.activation)
    return plain_linear(m.down_proj, h)


def plain_qkv(
    m: lk.LoRAQKV, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
) -> list[Tensor]:
    if "qkv_proj" in m._modules:
        n, kv = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
        parts = plain_linear(m.qkv_proj, x).split((n, kv, kv), -1)
    else:
        parts = [plain_linear(layer, x) for layer in (m.q_proj, m.k_proj, m.v_proj)]
    q, k, v = (t.unflatten(-1, (-1, m.head_dim)) for t in parts)
    found = []
    for t, norm in ((q, m.q_norm), (k, m.k_norm)):
        if norm is not None:
            t = F.rms_norm(t, (m.head_dim,), norm.weight.to(t.dtype), norm.eps)
        if cos is not None:
            c, s = cos.to(t.dtype).unsqueeze(-2), sin.to(t.dtype).unsqueeze(-2)
            first, second = t.chunk(2, -1)
            t = t * c + torch.cat([-second, first], -1) * s
        found.append(t)
    return [*found, v]


def plain_attention(
    m: lk.LoRAAttention, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
) -> Tensor:
    q, k, v = plain_qkv(m, x, cos, sin)
    repeat = m.num_heads // m.num_kv_heads
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(repeat, 2),
                                           v.repeat_interleave(repeat, 2)))  # fmt: skip
    scores = q @ k.transpose(2, 3) * (m.head_dim**-0.5 if m.scale is None else m.scale)
    if m.softcap:
        scores = m.softcap * torch.tanh(scores / m.softcap)
    at = torch.arange(q.shape[2])
    distance = at[:, None] - at
    if m.causal:
        scores = scores.masked_fill(distance < 0, float("-inf"))
    if m.window is not None and m.window[0] >= 0:
        scores = scores.masked_fill(distance > m.window[0], float("-inf"))
    if m.sinks is not None:
        extra = m.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return plain_linear(m.o_proj, (weights @ v).transpose(1, 2).flatten(2))


def gradients(
    run: Callable[[Tensor], Tensor | tuple[Tensor, ...]], owner: nn.Module, x: Tensor
) -> dict[str, Tensor]:
    """Results, dx and the gradient of every parameter that has one."""
    owner.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    out = run(x)
    outs = (out,) if isinstance(out, Tensor) else tuple(out)
    g = torch.Generator().manual_seed(1)
    dys = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in outs]
    torch.autograd.backward(outs, dys)
    found = {f"y{i}": t.detach() for i, t in enumerate(outs)} | {"dx": x.grad}
    return found | {n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None}


def in_fp64(module: nn.Module) -> nn.Module:
    """A copy with everything but packed weights in fp64."""
    return copy.deepcopy(module).double()
