"""gated_activation on the compiled CPU library (csrc/gated_activation): one pass in each direction,
nothing rounded between, products with adapters while a block of the result is in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels._backends import cpu as backend
from lora_kernels.ops.gated_activation.problem import GatedActivationProblem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(problem: GatedActivationProblem) -> tuple[bool, str]:
    if problem.device != "cpu":
        return False, f"gate is on {problem.device}, the library works on cpu tensors"
    module, reason = backend.load()
    if module is None:
        return False, reason
    if not hasattr(module, "gated_activation_bwd"):
        return False, "lora_kernels._C predates gated_activation; rebuild it"
    if problem.dtype not in _DTYPES:
        return False, f"dtype {problem.dtype} is not supported; float32, bfloat16 and float16 are"
    if not hasattr(module, "gated_activation_bwd_products"):
        if problem.kind == "gelu":
            return False, "lora_kernels._C predates kind 'gelu'; rebuild it"
        if problem.rank or problem.member_ranks:
            return False, "lora_kernels._C predates products with adapters; rebuild it"
    return True, "one pass over the rows"


def gated_activation_fwd(
    gate: Tensor, up: Tensor | None, kind: str, lora_as: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """H [M, N] of gate and up [M, N], S [M, sum of ranks]."""
    module, _ = backend.load()
    assert module is not None
    if lora_as:
        return module.gated_activation_fwd_products(gate, up, kind, lora_as)
    return module.gated_activation_fwd(gate, up, kind), gate.new_empty(gate.shape[0], 0)


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
    module, _ = backend.load()
    assert module is not None
    if lora_bs:
        dgate, dup, ds, dbs = module.gated_activation_bwd_products(
            dh, gate, up, kind, lora_bs, s, scalings
        )
        return dgate, None if up is None else dup, ds, dbs
    dgate, dup = module.gated_activation_bwd(dh, gate, up, kind)
    return dgate, None if up is None else dup, dh.new_empty(dh.shape[0], 0), []
