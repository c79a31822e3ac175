"""lora_qkv on the compiled CUDA kernels (csrc/lora_qkv/cuda): q and k leave the accumulators of
their projections rotated.

Forward: lora_linear's shrink, then one launch for all projections: the sm_90a kernel on Hopper for
heads of 64, 128 or 256 channels that are half-rotated as a whole, else the sm_80 one, which takes
any even head. ``LORA_KERNELS_CUDA_GEMM`` names one, as for lora_linear. The backward is rope's
kernel and lora_linear's: dY = dZ turned back is read by two kernels there, one of them many times,
so it is written once. Nothing waits for the device.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from lora_kernels._backends import cuda as backend
from lora_kernels.ops._philox import keep_scale, threshold
from lora_kernels.ops.lora_qkv.problem import LoraQkvProblem

_DTYPES = (torch.bfloat16, torch.float16)
_KERNEL_DTYPES = (torch.float32, *_DTYPES)
_MAX_GROUP, _MAX_RANK = 8, 256
_MAX_EXTENT = 2**31 - 1024
_HOPPER_HEADS = (64, 128, 256)


def supports(problem: LoraQkvProblem) -> tuple[bool, str]:
    """Can the kernels run `problem`, at whatever speed."""
    if problem.device != "cuda":
        return False, f"x is on {problem.device}, the kernels work on cuda tensors"
    if problem.dtype not in _DTYPES:
        return False, f"dtype {problem.dtype} is not supported; bfloat16 and float16 are"
    if problem.D % 2:
        return False, f"a head of {problem.D} channels has no pairs; an even number has"
    if problem.frozen and problem.dropout_p > 0.0:
        return False, "a projection has no adapter (rank 0), which is taken without dropout only"
    if problem.K == 0:
        return False, "in_features is 0"
    if problem.members > _MAX_GROUP:
        return False, f"{problem.members} projections are too many; at most {_MAX_GROUP}"
    if problem.rank > _MAX_RANK:
        return False, f"rank {problem.rank} is too large; at most {_MAX_RANK}"
    width = problem.D * max(problem.H, 2 * problem.Hk)
    if max(problem.M, problem.K, width) > _MAX_EXTENT:
        return False, f"an extent is larger than {_MAX_EXTENT}"
    reason = backend.lacking("lora_qkv_fwd", "lora_qkv")
    return (
        not reason,
        reason or f"CUDA C++ kernels, rotation in the epilogue of {_gemm_of(problem)}",
    )


def _gemm() -> str:
    """`auto`, `sm80` or `sm90`; lora_linear knows several of the last kind."""
    name = os.environ.get("LORA_KERNELS_CUDA_GEMM", "") or "auto"
    return "sm90" if name.startswith("sm90") else name


def _gemm_of(problem: LoraQkvProblem) -> str:
    """Which GEMM runs where there are rows enough and tensors are aligned."""
    whole = problem.R == problem.D and problem.D in _HOPPER_HEADS and not problem.interleaved
    hopper = torch.cuda.get_device_capability() == (9, 0)
    if _gemm() == "sm80" or not hopper or not whole or problem.K % 8:
        return "the sm_80 GEMM"
    return "the sm_90a GEMM"


def _narrow(t: Tensor) -> Tensor:
    """The kernels read fp32 and 16-bit adapters, biases and tables; fp64 is rounded to fp32."""
    return t if t.dtype in _KERNEL_DTYPES else t.to(torch.float32)


def lora_qkv_fwd(
    x: Tensor, weights: list[Tensor], lora_as: list[Tensor], lora_bs: list[Tensor],
    biases: list[Tensor | None], scalings: list[float], dropout_p: float, seed: Tensor | None,
    cos: Tensor, sin: Tensor, position_ids: Tensor | None, sequence: int, head_dim: int,
    rotated: list[int], interleaved: bool, inner: str,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Members [M, N_g], the first `rotated` heads of each rotated, and S [M, sum of ranks]."""
    library, reason = backend.load()
    assert library is not None, reason
    keep, least = 1.0, 0
    if dropout_p > 0.0 and seed is not None:
        keep, least = keep_scale(dropout_p), threshold(dropout_p)
    ys, s = library.lora_qkv_fwd(
        x, [w.to(x.dtype) for w in weights], [_narrow(a) for a in lora_as],
        [_narrow(b) for b in lora_bs], [None if b is None else _narrow(b) for b in biases],
        scalings, keep, least, seed if least else None, _narrow(cos), _narrow(sin), position_ids,
        sequence, head_dim, rotated, interleaved, _gemm(),
    )  # fmt: skip
    return ys, s
