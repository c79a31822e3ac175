"""gated_activation on Triton kernels: which launches, with which tiles, into which buffers.

    forward   one pass over gate and up that writes h and, with adapters, sums S beside it; one
              sum_partials where N was split
    backward  one pass over dh, gate and up that writes dgate and dup and, with adapters, sums dS
              and dB beside it (of large ranks a pass over dgate and dup for dS), one sum_partials

The inputs may have any strides; nothing is copied, and nothing waits for the device. CPU tensors
run in Triton's interpreter when TRITON_INTERPRET=1 was set before the first launch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels._backends import triton as backend
from lora_kernels.ops.gated_activation import triton_tiles as tiles
from lora_kernels.ops.gated_activation.problem import GatedActivationProblem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_device = backend.processors
_SUM_BLOCK, _SUM_ROWS = 256, 4


def supports(problem: GatedActivationProblem) -> tuple[bool, str]:
    """Can the kernels run `problem`, at whatever speed; the reason is for people."""
    able, reason = backend.usable(problem.device, problem.device_index, "gate")
    if not able:
        return False, reason
    if problem.dtype not in _DTYPES:
        return False, f"dtype {problem.dtype} is not supported; float32, bfloat16 and float16 are"
    if max(problem.member_ranks, default=0) > tiles.MAX_RANK:
        rank = max(problem.member_ranks)
        return False, f"rank {rank} is too large; at most {tiles.MAX_RANK}"
    if max(problem.M, problem.N) >= 2**31 - 2**16:
        return False, "an extent of about 2**31 or more is not supported"
    return True, reason


class _Kernels(NamedTuple):
    activate: Any
    gradients: Any
    sum_partials: Any


@functools.cache
def _kernels() -> _Kernels:
    from lora_kernels.ops import _triton_partial_sums
    from lora_kernels.ops.gated_activation import triton_activate, triton_gradients

    return _Kernels(
        triton_activate.activate, triton_gradients.gradients, _triton_partial_sums.sum_partials
    )


def _sum(results: list[tuple[Tensor, Tensor]]) -> None:
    """out = sum over the first axis of part, for each (part, out) that are not one tensor."""
    results = [(part, out) for part, out in results if part is not out and out.numel()]
    if not results:
        return
    parts, outs = zip(*results, strict=True)
    lengths = tuple(out.numel() for out in outs)
    firsts, blocks = [], 0
    for length in lengths:
        firsts.append(blocks)
        blocks += -(-length // _SUM_BLOCK)
    _kernels().sum_partials[(blocks,)](
        parts, outs, tuple(p.shape[0] for p in parts), lengths, tuple(firsts),
        G=len(outs), P=_SUM_ROWS, BLOCK=_SUM_BLOCK, num_warps=4,
    )  # fmt: skip


def _parts(out: Tensor, count: int) -> Tensor:
    """Where `count` programs put their shares of `out`: of one, the result itself."""
    return out if count == 1 else out.new_empty((count, *out.shape), dtype=torch.float32)


def gated_activation_fwd(
    gate: Tensor, up: Tensor | None, kind: str, lora_as: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """H [M, N] of gate and up [M, N], and S [M, sum of ranks] of the rounded H."""
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    s = gate.new_empty(gate.shape[0], sum(a.shape[0] for a in lora_as))
    with backend.on_device(gate), backend.arithmetic(_kernels().activate):
        if s.shape[1] == 0:
            _activate(gate, up, h, kind, [], s, 0, 1.0, tiles.plain_forward(*gate.shape))
            return h, s
        _sum([(_shrink(gate, up, h, kind, lora_as, s), s)])
    return h, s


def _shrink(
    gate: Tensor, up: Tensor | None, h: Tensor, kind: str, lora_as: list[Tensor], s: Tensor
) -> Tensor:
    """H, and the parts of S."""
    (m, n), (processors, amd), size = gate.shape, _device(gate), gate.dtype.itemsize
    lora_as = [part for a in lora_as for part in a.split(tiles.widest(size))]
    ranks = tuple(a.shape[0] for a in lora_as)
    ranges = tiles.launches(ranks, size)
    widths = [(j - i) * tiles.padded_rank(max(ranks[i:j])) for i, j in ranges]
    tile = tiles.shrink(m, n, max(widths), size, processors, amd)
    part = _parts(s, tile.splits)
    for first, last in ranges:
        column = sum(ranks[:first])
        if first == 0:
            _activate(gate, up, h, kind, lora_as[:last], part, column, 1.0, tile)
        else:  # of the members that did not fit beside the first
            _activate(h, None, h, "identity", lora_as[first:last], part, column, 1.0, tile)
    return part


def _activate(
    gate: Tensor, up: Tensor | None, h: Tensor, kind: str, lora_as: list[Tensor], s: Tensor,
    first_column: int, scale: float, tile: tiles.Tile,
) -> None:  # fmt: skip
    (m, n), ranks = gate.shape, tuple(a.shape[0] for a in lora_as)
    factor, members = gate if up is None else up, lora_as or [gate]
    _kernels().activate[(-(-m // tile.rows), tile.splits)](
        gate, factor, h, tuple(members), s, m, n, s.shape[-1], first_column, ranks or (0,),
        *gate.stride(), *factor.stride(), tuple(a.stride(0) for a in members),
        tuple(a.stride(1) for a in members), scale, tile.per_split,
        G=len(lora_as), RP=tiles.padded_rank(max(ranks, default=1)), BM=tile.rows,
        BN=tile.columns, KIND=kind, GATED=up is not None, PRECISION=backend.precision(gate.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def gated_activation_bwd(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    kind: str,
    lora_bs: list[Tensor],
    s: Tensor | None,
    scalings: list[float],
) -> tuple[Tensor, Tensor | None, Tensor, list[Tensor]]:
    """dgate and dup [M, N], dS [M, sum of ranks], dBs in the dtype of B; without S no dB."""
    m, n = gate.shape
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = None if up is None else torch.empty_like(dgate)
    ranks = tuple(b.shape[1] for b in lora_bs)
    ds = gate.new_empty(m, sum(ranks))
    dbs = (
        [] if s is None else [torch.empty(b.shape, dtype=b.dtype, device=b.device) for b in lora_bs]
    )
    with backend.on_device(gate), backend.arithmetic(_kernels().gradients):
        if sum(ranks) == 0:
            tile = tiles.plain_backward(m, n)
            _gradients(dh, gate, up, dgate, dup, kind, [], None, None, [], [], tile)
            return dgate, dup, ds, dbs
        (processors, amd), size = _device(gate), gate.dtype.itemsize
        unit = all(t.stride(1) == 1 for t in (dh, gate, *([] if up is None else [up]), *lora_bs))
        tile = tiles.gradients(m, n, tiles.padded_rank(max(ranks)), size, processors, amd, unit)
        apart = tiles.ds_apart(sum(ranks), len(ranks), tile, size)
        ds_part = _parts(ds, -(-n // tile.columns))
        db_parts = [_parts(db, tile.splits) for db in dbs]
        _gradients(
            dh, gate, up, dgate, dup, kind, lora_bs, s, None if apart else ds_part, db_parts,
            scalings, tile,
        )  # fmt: skip
        if apart:
            ds_part = _ds([dgate] if dup is None else [dgate, dup], lora_bs, scalings, ds)
        _sum([(ds_part, ds), *zip(db_parts, dbs, strict=True)])
    return dgate, dup, ds, dbs


def _ds(grads: list[Tensor], lora_bs: list[Tensor], scalings: list[float], ds: Tensor) -> Tensor:
    """The parts of dS by a pass over the gradients, a launch for each."""
    (m, n), (processors, amd) = grads[0].shape, _device(ds)
    ranks, size = [b.shape[1] for b in lora_bs], ds.dtype.itemsize
    most = tiles.widest(size)
    tile = tiles.shrink(m, n, tiles.padded_rank(min(max(ranks), most)), size, processors, amd)
    part, column = _parts(ds, tile.splits), 0
    for d, b, scaling in zip(grads, lora_bs, scalings, strict=True):
        for some in b.t().split(most):
            _activate(d, None, d, "identity", [some], part, column, float(scaling), tile)
            column += some.shape[0]
    return part


def _gradients(
    dh: Tensor, gate: Tensor, up: Tensor | None, dgate: Tensor, dup: Tensor | None, kind: str,
    lora_bs: list[Tensor], s: Tensor | None, ds_part: Tensor | None, db_parts: list[Tensor],
    scalings: list[float], tile: tiles.Tile,
) -> None:  # fmt: skip
    (m, n), ranks = gate.shape, [b.shape[1] for b in lora_bs]
    factor, dfactor = gate if up is None else up, dgate if dup is None else dup
    b = lora_bs or [gate]
    db = db_parts or [dgate]
    saved = gate if s is None else s
    _kernels().gradients[(-(-n // tile.columns), tile.splits)](
        dh, gate, factor, dgate, dfactor, b[0], b[-1], saved,
        dgate if ds_part is None else ds_part, db[0], db[-1], m, n, sum(ranks),
        ranks[0] if ranks else 0, ranks[-1] if ranks else 0,
        *dh.stride(), *gate.stride(), *factor.stride(), *b[0].stride(), *b[-1].stride(),
        *saved.stride(), float(scalings[0]) if ranks else 1.0,
        float(scalings[-1]) if ranks else 1.0, tile.per_split,
        RP=tiles.padded_rank(max(ranks, default=1)), BM=tile.rows, BN=tile.columns, KIND=kind,
        GATED=up is not None, NEED_DS=ds_part is not None, NEED_DB=bool(db_parts),
        PRECISION=backend.precision(gate.dtype), num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
