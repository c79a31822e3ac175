"""lora_qkv on a Triton kernel: q and k leave the accumulators of their projection rotated.

A projection of which heads are rotated is one launch of `triton_projection.project`; the others are
lora_linear's. S is one library product for all of them, without dropout only. The backward is
rope's kernel and lora_linear's. Nothing waits for the device.

CPU tensors run in Triton's interpreter when TRITON_INTERPRET=1 was set before the first launch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels._backends import triton as backend
from lora_kernels.ops.lora_qkv.problem import LoraQkvProblem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """Rows of x, pairs of channels (two columns each) and k of a step."""

    rows: int
    pairs: int
    step: int
    warps: int
    stages: int


# Two accumulators, and the addresses of rows of W one by one, take registers: eight warps.
LARGE, SMALL, SINGLE = Tile(64, 64, 32, 8, 3), Tile(16, 32, 64, 4, 3), Tile(32, 32, 16, 4, 2)
_FEW_ROWS = 32


def supports(problem: LoraQkvProblem) -> tuple[bool, str]:
    """Can the kernels run `problem`, at whatever speed; the reason is for people."""
    able, reason = backend.usable(problem.device, None, "x")
    if not able:
        return False, reason
    if problem.dtype not in _DTYPES:
        return False, f"dtype {problem.dtype} is not supported; float32, bfloat16 and float16 are"
    if problem.frozen:
        return False, "a projection has no adapter (rank 0), which this kernel does not take"
    if problem.dropout_p > 0.0:
        return False, "dropout masks x for S; lora_linear does that, and rope follows it"
    if problem.D % 2:
        return False, f"a head of {problem.D} channels has no pairs; an even number has"
    if problem.M >= 2**31:
        return False, "2**31 rows or more are not supported"
    return True, reason


def _kernel() -> Any:
    from lora_kernels.ops.lora_qkv import triton_projection

    return triton_projection.project


def tile_of(rows: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return SINGLE
    return SMALL if rows <= _FEW_ROWS else LARGE


def lora_qkv_fwd(
    x: Tensor, weights: list[Tensor], lora_as: list[Tensor], lora_bs: list[Tensor],
    biases: list[Tensor | None], scalings: list[float], dropout_p: float, seed: Tensor | None,
    cos: Tensor, sin: Tensor, position_ids: Tensor | None, sequence: int, head_dim: int,
    rotated: list[int], interleaved: bool, inner: str,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Members [M, N_g], the first `rotated` heads of each rotated, and S [M, sum of ranks]."""
    s = x @ torch.cat([a.to(x.dtype) for a in lora_as]).t()
    parts = s.split([a.shape[0] for a in lora_as], 1)
    ys: list[Tensor | None] = []
    for g, (w, b, bias, scaling) in enumerate(zip(weights, lora_bs, biases, scalings, strict=True)):
        ys.append(
            _project(
                x, w, parts[g], b, bias, scaling, cos, sin, position_ids, sequence, head_dim,
                rotated[g], interleaved,
            )
            if rotated[g]
            else None
        )  # fmt: skip
    plain = [g for g, y in enumerate(ys) if y is None]
    if plain:
        made, _ = torch.ops.lora_kernels.lora_linear_fwd.default(
            x, [weights[g] for g in plain], [lora_as[g] for g in plain],
            [lora_bs[g] for g in plain], [biases[g] for g in plain], [scalings[g] for g in plain],
            0.0, None, inner, None, torch.cat([parts[g] for g in plain], 1),
        )  # fmt: skip
        for g, y in zip(plain, made, strict=True):
            ys[g] = y
    return [y for y in ys if y is not None], s


def _project(
    x: Tensor, w: Tensor, s: Tensor, b: Tensor, bias: Tensor | None, scaling: float, cos: Tensor,
    sin: Tensor, position_ids: Tensor | None, sequence: int, head_dim: int, rotated: int,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    """[M, N] of one projection; see triton_projection.py."""
    (m, k), n = x.shape, w.shape[0]
    y = x.new_empty(m, n)
    w = w if w.dtype == x.dtype else w.to(x.dtype)
    c, rank = tile_of(m, x.dtype), b.shape[1]
    block = 16 if rank <= 16 or x.dtype == torch.float32 else 32
    grid = (-(-m // c.rows) * -(-(n // 2) // c.pairs),)
    ids = x if position_ids is None else position_ids
    kernel = _kernel()
    with backend.on_device(x), backend.arithmetic(kernel):
        kernel[grid](
            x, w, s, b, y if bias is None else bias, cos, sin, ids, y, m, n, k, rank, sequence,
            cos.shape[0], head_dim, cos.shape[-1], rotated, float(scaling),
            *x.stride(), *w.stride(), *s.stride(), *b.stride(),
            0 if bias is None else bias.stride(0), *_batched(cos, 3), *_batched(sin, 3),
            *((0, 0) if position_ids is None else _batched(ids, 2)),
            BM=c.rows, BP=c.pairs, BK=c.step, RB=block, RANK_BLOCKS=-(-rank // block),
            GROUP_M=8, EVEN_K=k % c.step == 0, HAS_BIAS=bias is not None,
            HAS_IDS=position_ids is not None, INTERLEAVED=interleaved,
            PRECISION=backend.precision(x.dtype), num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return y


def _batched(t: Tensor, dims: int) -> tuple[int, ...]:
    """Strides with that of the batch first; 0 where there is no batch, or it is shared."""
    strides = t.stride() if t.dim() == dims else (0, *t.stride())
    return (0, *strides[1:]) if t.dim() == dims and t.shape[0] == 1 else strides
