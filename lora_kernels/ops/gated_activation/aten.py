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
_SUMMED_ROWS = 512  # converted at a time for dB, so that the copy stays in the cache


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


def _scaled(product: Tensor, scaling: float) -> Tensor:
    return product if scaling == 1.0 else product.mul_(scaling)


def _db(d: Tensor, s: Tensor, dtype: torch.dtype, scaling: float) -> Tensor:
    """scaling * d^T s, summed in `dtype` where it is wider than d."""
    if dtype.itemsize <= d.dtype.itemsize:
        return _scaled(d.t() @ s, scaling).to(dtype)
    if d.is_cuda and dtype == torch.float32:
        return _scaled(torch.mm(d.t(), s, out_dtype=dtype), scaling)
    total = d.new_zeros(d.shape[1], s.shape[1], dtype=dtype)
    for i in range(0, d.shape[0], _SUMMED_ROWS):
        rows = slice(i, i + _SUMMED_ROWS)
        total.addmm_(d[rows].to(dtype).t(), s[rows].to(dtype), alpha=scaling)
    return total


def gated_activation_fwd(
    gate: Tensor, up: Tensor | None, kind: str, lora_as: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """H [M, N] of gate and up [M, N], S [M, sum of ranks]."""
    pieces = list(_pieces(gate))
    if len(pieces) == 1:
        h = _forward(gate, up, kind)
    else:
        h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        for some in pieces:
            h[some] = _forward(gate[some], None if up is None else up[some], kind)
    if not lora_as:
        return h, gate.new_empty(gate.shape[0], 0)
    low = [a.to(gate.dtype) for a in lora_as]
    return h, h @ (low[0] if len(low) == 1 else torch.cat(low)).t()


def gated_activation_bwd(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    kind: str,
    lora_bs: list[Tensor],
    s: Tensor | None,
    scalings: list[float],
) -> tuple[Tensor, Tensor | None, Tensor, list[Tensor]]:
    """dgate and dup [M, N] (dup None without up), dS [M, sum of ranks], dBs."""
    pieces = list(_pieces(gate))
    if len(pieces) == 1:
        dgate, dup = _backward(dh, gate, up, kind)
    else:
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = None if up is None else torch.empty_like(dgate)
        for some in pieces:
            dg, du = _backward(dh[some], gate[some], None if up is None else up[some], kind)
            dgate[some] = dg
            if dup is not None and du is not None:
                dup[some] = du
    if not lora_bs:
        return dgate, dup, dh.new_empty(dh.shape[0], 0), []
    grads = [dgate] if dup is None else [dgate, dup]
    members = list(zip(grads, lora_bs, scalings, strict=True))
    made = [_scaled(d @ b.to(dh.dtype), scaling) for d, b, scaling in members]
    ds = made[0] if len(made) == 1 else torch.cat(made, 1)
    if s is None:
        return dgate, dup, ds, []
    pairs = zip(members, s.split([b.shape[1] for b in lora_bs], 1), strict=True)
    return dgate, dup, ds, [_db(d, part, b.dtype, scaling) for (d, b, scaling), part in pairs]
