"""gated_activation on the compiled CPU library (csrc/gated_activation): one pass in each direction,
nothing rounded between, products with adapters while a block of the result is in the cache."""

from __future__ import annotations

from torch import Tensor

from lora_kernels._backends import cpu as backend
from lora_kernels.ops.gated_activation.problem import GatedActivationProblem


def supports(problem: GatedActivationProblem) -> tuple[bool, str]:
    why = backend.lacking(
        "gated_activation_bwd", "gated_activation", "gate", problem.device, problem.dtype
    )
    if why:
        return False, why
    module, _ = backend.load()
    assert module is not None
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
