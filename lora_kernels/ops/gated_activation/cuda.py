"""gated_activation on the compiled CUDA kernels (csrc/gated_activation/cuda).

Forward one pass, which makes S of up to 64 columns on the way (of more, lora_linear's shrink reads
h). Backward one pass, which makes dS and dB of ranks up to 32 on the way (of larger ones,
lora_linear's pass reads dgate and dup), and a second launch that adds partial sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels._backends import cuda as backend
from lora_kernels.ops.gated_activation.problem import KINDS, GatedActivationProblem

_DTYPES = (torch.bfloat16, torch.float16)
_KERNEL_DTYPES = (torch.float32, *_DTYPES)
_MAX_RANK = 256
_TOGETHER = 32  # ranks of which the gradients make dS and dB themselves
_MAX_GROUP = 8
_MAX_EXTENT = 2**31 - 1024
_ALIGN = 8


def supports(problem: GatedActivationProblem) -> tuple[bool, str]:
    """Can the kernels run `problem`, at whatever speed."""
    if problem.device != "cuda":
        return False, f"gate is on {problem.device}, the kernels work on cuda tensors"
    if problem.dtype not in _DTYPES:
        return False, f"dtype {problem.dtype} is not supported; bfloat16 and float16 are"
    if max(problem.member_ranks, default=0) > _MAX_RANK:
        return False, f"rank {max(problem.member_ranks)} is too large; at most {_MAX_RANK}"
    if max(problem.M, problem.N) > _MAX_EXTENT:
        return False, f"an extent is larger than {_MAX_EXTENT}"
    reason = backend.lacking("gated_activation_bwd", "gated_activation", problem.device_index)
    return not reason, reason or "CUDA C++ kernels"


def _adapter(t: Tensor) -> Tensor:
    """The kernels read fp32 and 16-bit adapters; fp64 is rounded to fp32 first."""
    return t if t.dtype in _KERNEL_DTYPES else t.to(torch.float32)


def gated_activation_fwd(
    gate: Tensor, up: Tensor | None, kind: str, lora_as: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """H [M, N] of gate and up [M, N], and S [M, sum of ranks] of the rounded H."""
    library, reason = backend.load()
    assert library is not None, reason
    members = [_adapter(part) for a in lora_as for part in a.split(_MAX_RANK) if a.shape[0]]
    number = KINDS.index(kind)
    h, s = library.gated_activation_fwd(gate, up, number, members[:_MAX_GROUP])
    parts = [s]
    for first in range(_MAX_GROUP, len(members), _MAX_GROUP):  # S of the rest of a large group
        some = members[first : first + _MAX_GROUP]
        parts.append(library.gated_activation_fwd(gate, up, number, some)[1])
    return h, s if len(parts) == 1 else torch.cat(parts, 1)


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
    library, reason = backend.load()
    assert library is not None, reason
    ranks = [b.shape[1] for b in lora_bs]
    dgate, dup, ds, dbs = library.gated_activation_bwd(
        dh, gate, up, KINDS.index(kind), [_adapter(b) for b in lora_bs], s, scalings
    )
    if max(ranks, default=0) > _TOGETHER:
        ds = _dense(ds, ranks)
    dbs = [db.to(b.dtype) for db, b in zip(dbs, lora_bs, strict=s is not None)]
    return dgate, None if up is None else dup, ds, dbs


def _dense(ds: Tensor, ranks: list[int]) -> Tensor:
    """dS without the columns that pad every member to a multiple of 8."""
    widths = [-(-rank // _ALIGN) * _ALIGN for rank in ranks]
    if widths == ranks:
        return ds
    parts = zip(ds.split(widths, 1), ranks, strict=True)
    return torch.cat([part[:, :rank] for part, rank in parts], 1)
