"""gated_activation over library calls: as many rows at a time as their fp32 copies stay in the
second-level cache of a CPU, so that memory is read and written once. Formulas: reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_ELEMENTS = 1 << 16  # of a piece on the CPU


def _pieces(t: Tensor) -> Iterator[slice]:
    """Slices of the rows of t [M, N]."""
    rows = t.shape[0]
    step = rows if t.device.type != "cpu" else max(1, _ELEMENTS // max(1, t.shape[1]))
    for begin in range(0, rows, max(1, step)):
        yield slice(begin, begin + step)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.float64 if t.dtype == torch.float64 else torch.float32)


def _act(g: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return F.silu(g)
    if kind.startswith("gelu"):
        return F.gelu(g, approximate="tanh" if kind == "gelu_tanh" else "none")
    positive = torch.relu(g)
    return positive if kind == "relu" else positive.square_()


def _slope(d: Tensor, g: Tensor, kind: str) -> Tensor:
    """d * act'(g)."""
    if kind == "silu":
        return torch.ops.aten.silu_backward(d, g)
    if kind.startswith("gelu"):
        approximate = "tanh" if kind == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_backward(d, g, approximate=approximate)
    if kind == "relu":
        return torch.ops.aten.threshold_backward(d, g, 0)
    return d * torch.relu(g).mul_(2.0)


def gated_activation_fwd(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """H [M, N] of gate and up [M, N]."""
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for some in _pieces(gate):
        part = _act(_wide(gate[some]), kind)
        h[some] = part if up is None else part.mul_(up[some])
    return h


def gated_activation_bwd(
    dh: Tensor, gate: Tensor, up: Tensor | None, kind: str
) -> tuple[Tensor, Tensor | None]:
    """dgate and dup [M, N]; dup None without up."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = None if up is None else torch.empty_like(dgate)
    for some in _pieces(gate):
        g, d = _wide(gate[some]), _wide(dh[some])
        if up is None or dup is None:
            dgate[some] = _slope(d, g, kind)
            continue
        dgate[some] = _slope(d * up[some], g, kind)
        dup[some] = _act(g, kind).mul_(d)
    return dgate, dup
