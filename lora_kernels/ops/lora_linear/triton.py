"""lora_linear on Triton kernels: which launches, with which tiles, into which buffers.

Dispatch calls :func:`supports`, :func:`lora_linear_fwd` and :func:`lora_linear_bwd`, with the
signatures of cpu.py. The inputs may have any strides; M may be 0, as K and N may. Copies are made
of weights in another dtype than x, and of nothing else. Nothing waits for the device, so the
calls can be captured in a graph once their kernels are compiled (the first call compiles).

    forward   shrink (one pass over X for the group), sum_partials if K was split, one K-extended
              GEMM per member
    backward  one pass over each dY for dS and dB (of large ranks a shrink for dS, one for dB), one
              sum_partials for all, one pass over X for every dA, its sum_partials, one K-extended
              GEMM for dX of the whole group

A given S saves the shrink, a given dS its half of the pass over dY, or all of it where no dB is
wanted.

CPU tensors run in Triton's interpreter when TRITON_INTERPRET=1 was set before the first launch.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels._backends import triton as backend
from lora_kernels.ops._philox import keep_scale, threshold
from lora_kernels.ops.lora_linear import configs
from lora_kernels.ops.lora_linear.problem import LoraLinearProblem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_GROUP = 4  # more sets of pointers do not fit the registers beside a tile
_MAX_MAPPED = 3  # members whose tensor maps one launch takes
_SUM_BLOCK = 1024
_MOST_SUMS = 4  # more sets of pointers spill on sm_100


def supports(problem: LoraLinearProblem) -> tuple[bool, str]:
    """Can the kernels run `problem`, at whatever speed; the reason is for people."""
    module, reason = backend.load()
    if module is None:
        return False, reason
    if problem.device == "cpu":
        if not backend.interpreting():
            return False, "x is on cpu; Triton kernels run there with TRITON_INTERPRET=1 only"
    elif problem.device != "cuda":
        return False, f"x is on {problem.device}, the kernels work on cuda tensors"
    elif backend.interpreting():
        return False, "TRITON_INTERPRET=1 is set, which is for cpu tensors; unset it"
    if problem.dtype not in _DTYPES:
        return False, (
            f"dtype {problem.dtype} is not supported; float32, bfloat16 and float16 are: "
            "tensor cores and the fp32 accumulator are no help to it"
        )
    if problem.device == "cuda":
        able, reason = _device_supported(problem.device_index)
        if not able:
            return False, reason
    if max(problem.rank) > configs.MAX_RANK:
        return False, f"rank {max(problem.rank)} is too large; at most {configs.MAX_RANK}"
    if len(problem.N) > _MAX_GROUP:
        return False, f"a group of {len(problem.N)} is too large; at most {_MAX_GROUP}"
    if problem.device == "cuda":
        where = _target("cuda", problem.device_index)
        reason = configs.refused(
            where, max(problem.rank), problem.dtype.itemsize, len(problem.N), problem.dropout_p > 0
        )
        if reason:
            return False, reason
    if max(problem.M, problem.K, *problem.N) >= 2**31:
        return False, "an extent of 2**31 or more is not supported"
    runner = "the interpreter" if problem.device == "cpu" else "Triton"
    return True, f"{runner} {module.__version__} kernels"


@functools.cache
def _device_supported(index: int) -> tuple[bool, str]:
    name, _, _ = backend.architecture(index)
    if name.startswith("sm_") and int(name[3:]) < 80:
        return False, f"{name} has no asynchronous copies and no bf16; sm_80 or newer is needed"
    return True, ""


class _Kernels(NamedTuple):
    shrink: Any
    dy_pass: Any
    da_pass: Any
    sum_partials: Any
    gemm_pointer: Any
    gemm_descriptor: Any
    descriptor: Any
    interpreted: bool


@functools.cache
def _kernels() -> _Kernels:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.tools.tensor_descriptor import TensorDescriptor

    from lora_kernels.ops.lora_linear import triton_adapter_grads, triton_gemm, triton_shrink

    return _Kernels(
        triton_shrink.shrink,
        triton_adapter_grads.dy_pass,
        triton_adapter_grads.da_pass,
        triton_adapter_grads.sum_partials,
        triton_gemm.gemm_pointer,
        triton_gemm.gemm_descriptor,
        TensorDescriptor,
        isinstance(triton_shrink.shrink, InterpretedFunction),
    )


def _arithmetic() -> AbstractContextManager[None]:
    if not _kernels().interpreted:
        return nullcontext()
    from lora_kernels._backends import triton_interpreter

    return triton_interpreter.exact()


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device; x need not be there."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


@functools.cache
def _target(device_type: str, index: int) -> configs.Target:
    if device_type == "cpu":  # the interpreter takes the choices of a large device
        return configs.target("sm_90", 132)
    name, processors, shared = backend.architecture(index)
    found = configs.target(name, processors)
    return found if not shared else configs.Target(name, processors, shared, found.descriptors)


def target_of(x: Tensor) -> configs.Target:
    return _target(x.device.type, x.device.index or 0)


class _Dropout(NamedTuple):
    on: bool
    threshold: int
    scale: float
    seed: Tensor


def _dropout(dropout_p: float, seed: Tensor | None, unused: Tensor) -> _Dropout:
    limit = 0 if seed is None else threshold(dropout_p)
    if seed is None or limit == 0:
        return _Dropout(False, 0, 1.0, unused)
    return _Dropout(True, limit, keep_scale(dropout_p), seed)


def lora_linear_fwd(
    x: Tensor,
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    biases: list[Tensor | None],
    scalings: list[float],
    dropout_p: float,
    seed: Tensor | None,
    shrunk: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Ys, each [M, N_g], and S [M, sum of ranks] in the dtype of x: `shrunk` where given."""
    with _on_device(x), _arithmetic():
        drop = _dropout(dropout_p, seed, x)
        s = _shrink(x, lora_as, drop) if shrunk is None else _unit_columns(shrunk)
        ys, column = [], 0
        for w, b, bias, scaling in zip(weights, lora_bs, biases, scalings, strict=True):
            rank = b.shape[1]
            y = x.new_empty(x.shape[0], w.shape[0])
            w = w if w.dtype == x.dtype else w.to(x.dtype)
            exact = x.dtype == torch.float16  # s S may leave the range of fp16
            _gemm(
                y, [x], [w.t()], [s[:, column : column + rank]], [b.t()], float(scaling), bias,
                None, exact,
            )  # fmt: skip
            column += rank
            ys.append(y)
        return ys, s if shrunk is None else shrunk


def lora_linear_bwd(
    dys: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    s: Tensor,
    scalings: list[float],
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    ds: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dX [M, K], dAs in the dtype of A, dBs in the dtype of B; what is not needed is empty."""
    with _on_device(x), _arithmetic():
        drop = _dropout(dropout_p, seed, x)
        make_ds = (need_dx or need_da) and ds is None
        dss, dbs = _dy_passes(
            dys, x, lora_bs, _unit_columns(s), scalings, drop, make_ds, need_db
        )  # fmt: skip
        if ds is not None:
            dss = list(_unit_columns(ds).split([a.shape[0] for a in lora_as], 1))
        das = _da_pass(x, lora_as, dss, drop) if need_da else []
        dx = x.new_empty(x.shape) if need_dx else x.new_empty(0)
        if need_dx:
            ws = [w if w.dtype == x.dtype else w.to(x.dtype) for w in weights]
            _gemm(dx, dys, ws, dss, lora_as, 1.0, None, drop, False)
        return dx, das, dbs


def _unit_columns(t: Tensor) -> Tensor:
    """S and dS with any distance of rows; what a caller gives may have any strides."""
    return t if t.stride(1) == 1 else t.contiguous()


def _shrink(x: Tensor, lora_as: list[Tensor], drop: _Dropout) -> Tensor:
    (m, k), where = x.shape, target_of(x)
    ranks = tuple(a.shape[0] for a in lora_as)
    vectors = all(_fits_map(t) for t in (x, *lora_as))
    most = configs.shrink_width(x.dtype.itemsize, drop.on, vectors)
    launches = configs.members_per_launch(ranks, most)
    widths = [(j - i) * configs.padded_rank(max(ranks[i:j])) for i, j in launches]
    c = configs.shrink(m, k, max(widths), x.dtype.itemsize, where, drop.on, vectors)
    blocks = -(-k // c.step)
    per_split = max(1, -(-blocks // c.splits))
    splits = max(1, -(-blocks // per_split))
    s = x.new_empty(m, sum(ranks))
    out = s if splits == 1 else x.new_empty(splits, m, sum(ranks), dtype=torch.float32)
    for first, last in launches:
        members = lora_as[first:last]
        _kernels().shrink[(-(-m // c.held), splits)](
            x, tuple(members), out, drop.seed, m, k, sum(ranks), sum(ranks[:first]),
            ranks[first:last], *x.stride(),
            tuple(a.stride(0) for a in members), tuple(a.stride(1) for a in members),
            drop.scale, drop.threshold, per_split, first,
            G=last - first, RP=configs.padded_rank(max(ranks[first:last])), BM=c.held, BK=c.step,
            PARTIAL=splits > 1, EVEN_K=k % c.step == 0, DROPOUT=drop.on,
            PRECISION=backend.precision(x.dtype), num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    if splits > 1:
        _sum_partials([(out, s, drop.scale)])
    return s


def _gemm(
    out: Tensor,
    lefts: list[Tensor],
    rights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    scale: float,
    bias: Tensor | None,
    drop: _Dropout | None,
    exact: bool,
) -> None:
    """out = sum of left right + scale mask(u v) + bias; see triton_gemm.py for the shapes."""
    (m, p), where = out.shape, target_of(out)
    if m == 0 or p == 0:
        return
    masked = drop is not None and drop.on
    ranks = tuple(u.shape[1] for u in us)
    size = out.dtype.itemsize
    vectors = _fits_maps(out, lefts, rights)
    tensor_maps = where.descriptors and size == 2 and len(lefts) <= _MAX_MAPPED and vectors
    c = configs.gemm(
        m, p, max(ranks), size, where,
        dropout=masked, exact=exact, descriptor=tensor_maps, members=len(lefts),
        vectors=vectors,
    )  # fmt: skip
    tiles = -(-m // c.block_m) * -(-p // c.block_n)
    programs = min(tiles, where.processors) if c.persistent else tiles
    block = configs.rank_block(max(ranks), size)
    arguments = (
        tuple(us), tuple(vs), out if bias is None else bias, 0 if bias is None else bias.stride(0),
    )  # fmt: skip
    tail = (
        tuple(u.stride(0) for u in us), tuple(v.stride(0) for v in vs),
        tuple(v.stride(1) for v in vs), scale, drop.threshold if masked and drop else 0, programs,
    )  # fmt: skip
    seed = drop.seed if masked and drop else out
    qs = tuple(left.shape[1] for left in lefts)
    constants = {
        "G": len(lefts), "BM": c.block_m, "BP": c.block_n, "BQ": c.block_k, "RB": block,
        "RANK_BLOCKS": -(-max(ranks) // block), "GROUP_M": c.group_m, "HAS_BIAS": bias is not None,
        "DROPOUT": masked, "LORA_LAST": c.lora_last, "PERSISTENT": c.persistent,
        "SCALE": scale != 1.0, "PRECISION": backend.precision(out.dtype),
        "num_warps": c.num_warps, "num_stages": c.num_stages,
    }  # fmt: skip
    if not c.descriptor:
        _kernels().gemm_pointer[(programs,)](
            tuple(lefts), tuple(rights), *arguments, out, seed, m, p, qs, ranks,
            tuple(t.stride(0) for t in lefts), tuple(t.stride(1) for t in lefts),
            tuple(t.stride(1) for t in rights), tuple(t.stride(0) for t in rights), *tail,
            EVEN_Q=all(q % c.block_k == 0 for q in qs), **constants,
        )  # fmt: skip
        return
    r_is_pq = _transposed(rights[0])
    block_r = [c.block_n, c.block_k] if r_is_pq else [c.block_k, c.block_n]
    maps = _kernels().descriptor.from_tensor
    pairs: list[Any] = [None] * (2 * _MAX_MAPPED)
    for g, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        pairs[2 * g] = maps(left, [c.block_m, c.block_k])
        pairs[2 * g + 1] = maps(right.t() if r_is_pq else right, block_r)
    _kernels().gemm_descriptor[(programs,)](
        *pairs, *arguments, maps(out, [c.block_m, c.block_n // c.store_parts]), seed, m, p,
        qs, ranks, *tail,
        R_IS_PQ=r_is_pq, FLATTEN=c.flatten, STORE_PARTS=c.store_parts, **constants,
    )  # fmt: skip


def _transposed(t: Tensor) -> bool:
    return t.stride(0) == 1 and t.stride(1) != 1


def _fits_maps(out: Tensor, lefts: list[Tensor], rights: list[Tensor]) -> bool:
    """Can every operand be described to the unit for tensor maps, all `rights` the same way."""
    turned = [t.t() for t in rights] if _transposed(rights[0]) else rights
    return all(_fits_map(t) for t in (out, *lefts, *turned))


def _fits_map(t: Tensor) -> bool:
    """Rows of whole 16 bytes at an aligned address, not overlapping, nothing empty."""
    row = t.stride(0) * t.element_size()
    return (
        t.stride(1) == 1
        and t.numel() > 0
        and row % 16 == 0
        and row >= t.shape[1] * t.element_size()
        and t.data_ptr() % 16 == 0
    )


def _dy_passes(
    dys: list[Tensor],
    x: Tensor,
    lora_bs: list[Tensor],
    s: Tensor,
    scalings: list[float],
    drop: _Dropout,
    need_ds: bool,
    need_db: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """dS_g [M, r_g] in the dtype of x and dB_g [N_g, r_g] in the dtype of B."""
    m, where, column = x.shape[0], target_of(x), 0
    dss, dbs, sums = [], [], []
    for dy, b, scaling in zip(dys, lora_bs, scalings, strict=True):
        n, rank = b.shape
        c = configs.dy_pass(m, n, rank, x.dtype.itemsize, where)
        tiles = -(-n // c.held)
        per_split = max(1, -(-m // (c.splits * c.step))) * c.step
        splits = max(1, -(-m // per_split))
        part_s = s[:, column : column + rank]
        column += rank
        factor = float(scaling * drop.scale)
        apart = need_ds and configs.ds_apart(rank, c, x.dtype.itemsize)
        with_ds = need_ds and not apart
        ds_part = x.new_empty((tiles, m, rank) if with_ds else 0, dtype=torch.float32)
        db_part = x.new_empty((splits, n, rank) if need_db else 0, dtype=torch.float32)
        if tiles and (with_ds or need_db):
            _kernels().dy_pass[(tiles, splits)](
                dy, b, part_s, ds_part, db_part, m, n, rank, *dy.stride(), *b.stride(),
                s.stride(0), per_split,
                RP=configs.padded_rank(rank), BM=c.step, BN=c.held,
                NEED_DS=with_ds, NEED_DB=need_db, PRECISION=backend.precision(x.dtype),
                num_warps=c.num_warps, num_stages=c.num_stages,
            )  # fmt: skip
        if apart:
            plain = _Dropout(False, 0, factor, dy)
            dss.append(_shrink(dy, [b.t()], plain))
        elif need_ds:
            dss.append(x.new_empty(m, rank))
            sums.append((ds_part, dss[-1], factor))
        if need_db:
            dbs.append(b.new_empty(b.shape))
            sums.append((db_part, dbs[-1], float(scaling)))
    _sum_partials(sums)
    return dss, dbs


def _da_pass(x: Tensor, lora_as: list[Tensor], dss: list[Tensor], drop: _Dropout) -> list[Tensor]:
    """dA_g [r_g, K] in the dtype of A_g; dS_g holds the scaling."""
    (m, k), where = x.shape, target_of(x)
    ranks = tuple(a.shape[0] for a in lora_as)
    das = [a.new_empty(a.shape) for a in lora_as]
    sums = []
    for first, last in configs.members_per_launch(ranks, configs.MAX_RANK):
        part_ranks = ranks[first:last]
        total, count = sum(part_ranks), last - first
        padded = configs.padded_rank(max(part_ranks))
        c = configs.da_pass(m, k, count * padded, x.dtype.itemsize, where)
        per_split = max(1, -(-m // (c.splits * c.step))) * c.step
        splits = max(1, -(-m // per_split))
        part = x.new_empty(splits, total, k, dtype=torch.float32)
        if k:
            _kernels().da_pass[(-(-k // c.held), splits)](
                x, tuple(dss[first:last]), part, drop.seed, m, k, total, part_ranks,
                tuple(d.stride(0) for d in dss[first:last]), *x.stride(),
                drop.threshold, per_split, first,
                G=count, RP=padded, BM=c.step, BK=c.held,
                DROPOUT=drop.on, PRECISION=backend.precision(x.dtype),
                num_warps=c.num_warps, num_stages=c.num_stages,
            )  # fmt: skip
        row = 0
        for g in range(first, last):
            sums.append((part[:, row : row + ranks[g]], das[g], 1.0))
            row += ranks[g]
    _sum_partials(sums)
    return das


def _sum_partials(sums: list[tuple[Tensor, Tensor, float]]) -> None:
    """out = scale * sum over the first axis of part, for each (part, out, scale), four a launch."""
    sums = [entry for entry in sums if entry[1].numel()]
    if len(sums) > _MOST_SUMS:
        _sum_partials(sums[_MOST_SUMS:])
        sums = sums[:_MOST_SUMS]
    if not sums:
        return
    parts, outs, scales = zip(*sums, strict=True)
    lengths = tuple(out.numel() for out in outs)
    firsts, blocks = [], 0
    for length in lengths:
        firsts.append(blocks)
        blocks += -(-length // _SUM_BLOCK)
    _kernels().sum_partials[(blocks,)](
        parts, outs, tuple(p.shape[0] for p in parts), lengths,
        tuple(p.stride(0) for p in parts), tuple(firsts), scales,
        G=len(sums), BLOCK=_SUM_BLOCK, num_warps=4,
    )  # fmt: skip
