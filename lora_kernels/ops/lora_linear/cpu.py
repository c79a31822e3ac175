"""lora_linear on the compiled CPU library (csrc/lora_linear)."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels._backends import cpu as backend
from lora_kernels.ops.lora_linear.packing import packed_weight
from lora_kernels.ops.lora_linear.problem import LoraLinearProblem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_GROUP = 8


def supports(problem: LoraLinearProblem) -> tuple[bool, str]:
    """Can the library run `problem`, at whatever speed."""
    if problem.device != "cpu":
        return False, f"x is on {problem.device}, the library works on cpu tensors"
    module, reason = backend.load()
    if module is None:
        return False, reason
    if problem.dtype not in _DTYPES:
        return False, f"dtype {problem.dtype} is not supported; float32, bfloat16 and float16 are"
    if problem.K == 0 or 0 in problem.N:
        return False, "in_features or out_features is 0"
    if len(problem.N) > _MAX_GROUP:
        return False, f"a group of {len(problem.N)} is too large; at most {_MAX_GROUP}"
    if not hasattr(module, "lora_linear_fwd_few"):
        return False, "lora_kernels._C predates weights read as they are; rebuild it"
    if problem.given and not hasattr(module, "lora_linear_given"):
        return False, "lora_kernels._C predates a given S or dS; rebuild it"
    dropping = problem.dropout_p > 0.0
    if dropping and 0 in problem.rank and not hasattr(module, "lora_linear_rank_zero"):
        return False, "lora_kernels._C predates members without an adapter; rebuild it"
    return True, f"{module.lora_linear_engine(problem.dtype)} kernels"


def _few(rows: int, dtype: torch.dtype, row_major: bool, dropout_p: float) -> bool:
    """So few rows of x that the weight is read once, where it lies."""
    if dropout_p > 0.0 or not row_major:
        return False
    module, _ = backend.load()
    assert module is not None
    return rows <= module.lora_linear_few_rows(dtype)


def preferred(problem: LoraLinearProblem, direction: str = "fwd") -> tuple[bool, str]:
    """Is the library the choice of `auto`: it can run `problem` and does not lose to `aten`."""
    able, why = supports(problem)
    if not able:
        return able, why
    p = problem
    read_as_is = direction == "fwd" and p.row_major and p.weight_dtype == p.dtype
    if read_as_is and _few(p.M, p.dtype, True, p.dropout_p):
        return True, "weights are read as they are for so few rows"
    module, _ = backend.load()
    assert module is not None
    engine = module.lora_linear_engine(problem.dtype)
    if engine in ("avx2", "baseline"):
        return False, f"the {engine} kernels do not beat the library GEMMs"
    if engine == "avx512" and problem.dropout_p == 0.0:
        # benchmarks/results: a tie within the noise, at the price of packed copies.
        return False, f"the {engine} kernels do not beat the library GEMMs without dropout"
    if not problem.frozen:
        return False, "the weight is trained, so a packed copy would not live longer than a call"
    return True, why


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
    module, _ = backend.load()
    assert module is not None
    row_major = all(w.stride(1) == 1 and w.dtype == x.dtype for w in weights)
    if _few(x.shape[0], x.dtype, row_major, dropout_p):
        return module.lora_linear_fwd_few(x, weights, lora_as, lora_bs, biases, scalings, shrunk)
    packed = [packed_weight(w, x.dtype, False) for w in weights]
    ys, s = module.lora_linear_fwd(
        x, packed, [w.shape[0] for w in weights], lora_as, lora_bs, biases, scalings,
        dropout_p, seed, *(() if shrunk is None else (shrunk,)),
    )  # fmt: skip
    return ys, s


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
    module, _ = backend.load()
    assert module is not None
    packed = [packed_weight(w, x.dtype, True) for w in weights] if need_dx else []
    return module.lora_linear_bwd(
        dys, x, packed, lora_as, lora_bs, s, scalings, dropout_p, seed,
        need_dx, need_da, need_db, *(() if ds is None else (ds,)),
    )  # fmt: skip
