"""gated_activation over library calls, in the dtype of gate: each rounds once, as in eager PyTorch.

On the CPU some rows at a time, so that what lies between two calls is still in the cache and no
temporary has the size of gate. Formulas: reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_ELEMENTS = 1 << 18  # of a piece on the CPU, per thread


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


def gated_activation_fwd(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """H [M, N] of gate and up [M, N]."""
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for some in _pieces(gate):
        part = _act(gate[some], kind)
        if up is None:
            h[some] = part
        else:
            torch.mul(part, up[some], out=h[some])
    return h


def gated_activation_bwd(
    dh: Tensor, gate: Tensor, up: Tensor | None, kind: str
) -> tuple[Tensor, Tensor | None]:
    """dgate and dup [M, N]; dup None without up."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = None if up is None else torch.empty_like(dgate)
    for some in _pieces(gate):
        g, d = gate[some], dh[some]
        if up is None or dup is None:
            dgate[some] = _slope(d, g, kind)
            continue
        torch.mul(_act(g, kind), d, out=dup[some])
        dgate[some] = _slope(d * up[some], g, kind)
    return dgate, dup
