"""gated_activation over library calls, in the dtype of gate: each rounds once, as in eager PyTorch.

On the CPU a large problem goes in pieces of rows, so that no temporary has its size. Formulas:
reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_ELEMENTS = 1 << 20  # of a piece on the CPU, per thread


def _pieces(t: Tensor) -> Iterator[slice]:
    """Slices of the rows of t [M, N]."""
    rows = t.shape[0]
    step = rows
    if t.device.type == "cpu":
        step = max(1, _ELEMENTS * torch.get_num_threads() // max(1, t.shape[1]))
    for begin in range(0, rows, max(1, step)):
        yield slice(begin, begin + step)


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


def _forward(g: Tensor, u: Tensor | None, kind: str) -> Tensor:
    h = _act(g, kind)
    return h if u is None else h.mul_(u)


def _backward(d: Tensor, g: Tensor, u: Tensor | None, kind: str) -> tuple[Tensor, Tensor | None]:
    if u is None:
        return _slope(d, g, kind), None
    return _slope(d * u, g, kind), _act(g, kind).mul_(d)


def gated_activation_fwd(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """H [M, N] of gate and up [M, N]."""
    pieces = list(_pieces(gate))
    if len(pieces) == 1:
        return _forward(gate, up, kind)
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for some in pieces:
        h[some] = _forward(gate[some], None if up is None else up[some], kind)
    return h


def gated_activation_bwd(
    dh: Tensor, gate: Tensor, up: Tensor | None, kind: str
) -> tuple[Tensor, Tensor | None]:
    """dgate and dup [M, N]; dup None without up."""
    pieces = list(_pieces(gate))
    if len(pieces) == 1:
        return _backward(dh, gate, up, kind)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = None if up is None else torch.empty_like(dgate)
    for some in pieces:
        dg, du = _backward(dh[some], gate[some], None if up is None else up[some], kind)
        dgate[some] = dg
        if dup is not None and du is not None:
            dup[some] = du
    return dgate, dup
