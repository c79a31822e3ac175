"""Oracle of gated_activation: the formulas, in plain PyTorch.

    h = act(g) * u                  without u: h = act(g)
    dg = dh * u * act'(g)           du = dh * act(g)

    silu          g s,  s = 1 / (1 + e^-g)                  act' = s (1 + g (1 - s))
    gelu          g P,  P = (1 + erf(g / sqrt 2)) / 2       act' = P + g e^(-g^2 / 2) / sqrt(2 pi)
    gelu_tanh     g (1 + t) / 2,  t = tanh(c (g + a g^3))   act' = (1 + t) / 2
                  c = sqrt(2 / pi), a = 0.044715                   + g (1 - t^2) c (1 + 3 a g^2) / 2
    relu          max(g, 0)                                 act' = [g > 0]
    relu_squared  max(g, 0)^2                               act' = 2 max(g, 0)

With adapters of the layers around it, from the rounded h, dg, du (d_0 = dg, d_1 = du):

    S = h A_cat^T        dS_i = s_i d_i B_i        dB_i = s_i d_i^T S_i

Computed in fp32 (fp64 for fp64) and rounded once; dB in the dtype of B. Sources: Shazeer 2020,
arXiv 2002.05202 (gated units); Hendrycks and Gimpel 2016, arXiv 1606.08415 (GELU and its
approximation); So et al. 2021, arXiv 2109.08668 (squared ReLU); Hu et al. 2021, arXiv 2106.09685
(the adapters).
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


def gated_activation_fwd(
    gate: Tensor, up: Tensor | None, kind: str, lora_as: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """H in the shape and dtype of gate, S [M, sum of ranks]."""
    h, _ = _activation(_wide(gate), kind)
    h = (h if up is None else h * _wide(up)).to(gate.dtype)
    if not lora_as:
        return h, gate.new_empty(gate.shape[0], 0)
    return h, torch.cat([_wide(h) @ _wide(a).t() for a in lora_as], 1).to(gate.dtype)


def gated_activation_bwd(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    kind: str,
    lora_bs: list[Tensor],
    s: Tensor | None,
    scalings: list[float],
) -> tuple[Tensor, Tensor | None, Tensor, list[Tensor]]:
    """dgate, dup in the dtype of gate (dup None without up), dS [M, sum of ranks], dBs."""
    act, slope = _activation(_wide(gate), kind)
    wide = _wide(dh)
    if up is None:
        grads: list[Tensor] = [(wide * slope).to(gate.dtype)]
    else:
        grads = [(wide * _wide(up) * slope).to(gate.dtype), (wide * act).to(gate.dtype)]
    dup = None if up is None else grads[1]
    if not lora_bs:
        return grads[0], dup, dh.new_empty(dh.shape[0], 0), []
    members = list(zip(grads, lora_bs, scalings, strict=True))
    ds = torch.cat([scaling * (_wide(d) @ _wide(b)) for d, b, scaling in members], 1).to(dh.dtype)
    if s is None:
        return grads[0], dup, ds, []
    parts = s.split([b.shape[1] for b in lora_bs], 1)
    dbs = [
        (scaling * (_wide(d).t() @ _wide(part))).to(b.dtype)
        for (d, b, scaling), part in zip(members, parts, strict=True)
    ]
    return grads[0], dup, ds, dbs
