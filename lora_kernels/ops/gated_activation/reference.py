"""Oracle of gated_activation: the formulas, in plain PyTorch.

    h = act(g) * u                  without u: h = act(g)
    dg = dh * u * act'(g)           du = dh * act(g)

    silu          g s,  s = 1 / (1 + e^-g)                  act' = s (1 + g (1 - s))
    gelu          g P,  P = (1 + erf(g / sqrt 2)) / 2       act' = P + g e^(-g^2 / 2) / sqrt(2 pi)
    gelu_tanh     g (1 + t) / 2,  t = tanh(c (g + a g^3))   act' = (1 + t) / 2
                  c = sqrt(2 / pi), a = 0.044715                   + g (1 - t^2) c (1 + 3 a g^2) / 2
    relu          max(g, 0)                                 act' = [g > 0]
    relu_squared  max(g, 0)^2                               act' = 2 max(g, 0)

Computed in fp32 (fp64 for fp64) and rounded once. Sources: Shazeer 2020, arXiv 2002.05202 (gated
units); Hendrycks and Gimpel 2016, arXiv 1606.08415 (GELU and its approximation); So et al. 2021,
arXiv 2109.08668 (squared ReLU).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_C, _A = math.sqrt(2.0 / math.pi), 0.044715


def _activation(g: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """act(g) and act'(g)."""
    if kind == "silu":
        s = torch.sigmoid(g)
        return g * s, s * (1.0 + g * (1.0 - s))
    if kind == "gelu":
        p = 0.5 * (1.0 + torch.erf(g / math.sqrt(2.0)))
        return g * p, p + g * torch.exp(-0.5 * g * g) / math.sqrt(2.0 * math.pi)
    if kind == "gelu_tanh":
        t = torch.tanh(_C * (g + _A * g * g * g))
        slope = 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * _C * (1.0 + 3.0 * _A * g * g)
        return 0.5 * g * (1.0 + t), slope
    positive = torch.relu(g)
    if kind == "relu":
        return positive, (g > 0).to(g.dtype)
    return positive * positive, 2.0 * positive


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.float64 if t.dtype == torch.float64 else torch.float32)


def gated_activation_fwd(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """H in the shape and dtype of gate."""
    h, _ = _activation(_wide(gate), kind)
    return (h if up is None else h * _wide(up)).to(gate.dtype)


def gated_activation_bwd(
    dh: Tensor, gate: Tensor, up: Tensor | None, kind: str
) -> tuple[Tensor, Tensor | None]:
    """dgate and dup in the dtype of gate; dup None without up."""
    act, slope = _activation(_wide(gate), kind)
    wide = _wide(dh)
    if up is None:
        return (wide * slope).to(gate.dtype), None
    return (wide * _wide(up) * slope).to(gate.dtype), (wide * act).to(gate.dtype)
