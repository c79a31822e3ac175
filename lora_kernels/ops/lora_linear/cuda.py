"""lora_linear on the compiled CUDA kernels (csrc/lora_linear/cuda).

Forward: shrink, then one K-extended GEMM. Backward: one pass over dY for dS and dB, dA, then one
K-extended GEMM for dX. A given S takes the place of the shrink, a given dS that of its half of the
pass over dY. The GEMM is the sm_90a one on Hopper where every operand has 16-byte rows,
else the sm_80 one; ``LORA_KERNELS_CUDA_GEMM`` names another (`GEMMS`) for tests and tuning.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from lora_kernels._backends import cuda as backend
from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops._philox import keep_scale, threshold
from lora_kernels.ops.lora_linear.problem import LoraLinearProblem

GEMMS = (
    "auto", "sm80", "sm90", "sm90_128x256_cluster", "sm90_128x256", "sm90_128x128_cluster",
    "sm90_128x128",
)  # fmt: skip
_DTYPES = (torch.bfloat16, torch.float16)
_KERNEL_DTYPES = (torch.float32, *_DTYPES)
_MAX_GROUP = 8
_MAX_RANK = 256
_MAX_EXTENT = 2**31 - 1024


def supports(problem: LoraLinearProblem) -> tuple[bool, str]:
    """Can the kernels run `problem`, at whatever speed."""
    if problem.device != "cuda":
        return False, f"x is on {problem.device}, the kernels work on cuda tensors"
    if problem.dtype not in _DTYPES:
        return False, f"dtype {problem.dtype} is not supported; bfloat16 and float16 are"
    if problem.K == 0 or 0 in problem.N:
        return False, "in_features or out_features is 0"
    if len(problem.N) > _MAX_GROUP:
        return False, f"a group of {len(problem.N)} is too large; at most {_MAX_GROUP}"
    if max(problem.rank) > _MAX_RANK:
        return False, f"rank {max(problem.rank)} is too large; at most {_MAX_RANK}"
    if max(problem.M, problem.K, *problem.N) > _MAX_EXTENT:
        return False, f"an extent is larger than {_MAX_EXTENT}"
    if 0 in problem.rank and problem.dropout_p > 0.0:
        return False, "a member has no adapter (rank 0), which the kernels take without dropout"
    reason = backend.device_reason() or (_given_reason() if problem.given else "")
    if not reason and 0 in problem.rank:
        reason = _frozen_reason()
    return not reason, reason or f"CUDA C++ kernels, {_gemm_of(problem)}"


@functools.cache
def _given_reason() -> str:
    """Why the library takes no given S or dS; "" where it does."""
    library, _ = backend.load()
    known = {a.name for a in library.lora_linear_fwd.default._schema.arguments}
    return "" if "shrunk" in known else "the CUDA library predates a given S or dS; rebuild it"


@functools.cache
def _frozen_reason() -> str:
    """Why the library takes no member of rank 0; "" where it does, as of lora_qkv."""
    library, _ = backend.load()
    known = hasattr(library, "lora_qkv_fwd")
    return "" if known else "the CUDA library predates members without an adapter; rebuild it"


def _gemm_of(problem: LoraLinearProblem) -> str:
    """Which GEMM runs where the tensors are aligned, and why it is not the sm_90a one."""
    if _gemm() != "auto":
        return f"{_gemm()} GEMM by LORA_KERNELS_CUDA_GEMM"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"sm_80 GEMM (compute capability {major}.{minor}; the sm_90a one needs 9.0)"
    if any(n % 8 for n in (problem.K, *problem.N)):
        return "sm_80 GEMM (in_features or out_features is no multiple of 8)"
    return "sm_90a GEMM"


def _gemm() -> str:
    name = os.environ.get("LORA_KERNELS_CUDA_GEMM", "") or "auto"
    if name not in GEMMS:
        raise InvalidArgumentError(
            f"LORA_KERNELS_CUDA_GEMM={name!r} is unknown; accepted: {', '.join(GEMMS)}"
        )
    return name


def _adapter(t: Tensor) -> Tensor:
    """The kernels read fp32 and 16-bit adapters and biases; fp64 is rounded to fp32 first."""
    return t if t.dtype in _KERNEL_DTYPES else t.to(torch.float32)


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[float, int, Tensor | None]:
    """(1 / P(keep), smallest draw that is kept, seed)."""
    if dropout_p == 0.0 or seed is None:
        return 1.0, 0, None
    return keep_scale(dropout_p), threshold(dropout_p), seed


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
    library, reason = backend.load()
    assert library is not None, reason
    ys, s = library.lora_linear_fwd(
        x, [w.to(x.dtype) for w in weights], [_adapter(a) for a in lora_as],
        [_adapter(b) for b in lora_bs], [None if b is None else _adapter(b) for b in biases],
        scalings, *_dropout(dropout_p, seed), _gemm(), *(() if shrunk is None else (shrunk,)),
    )  # fmt: skip
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
    library, reason = backend.load()
    assert library is not None, reason
    dx, das, dbs = library.lora_linear_bwd(
        dys, x, [w.to(x.dtype) for w in weights], [_adapter(a) for a in lora_as],
        [_adapter(b) for b in lora_bs], s, scalings, *_dropout(dropout_p, seed),
        need_dx, need_da, need_db, _gemm(), *(() if ds is None else (ds,)),
    )  # fmt: skip
    das = [d.to(a.dtype) for d, a in zip(das, lora_as, strict=need_da)]
    dbs = [d.to(b.dtype) for d, b in zip(dbs, lora_bs, strict=need_db)]
    return dx, das, dbs
