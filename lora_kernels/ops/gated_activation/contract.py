"""The registered op pair of gated_activation: schema, implementation, fake. Torch only.

Deliberately not differentiable; autograd.py wraps it. Everything here is 2-D. What a caller does
not ask for is empty: s and ds have no columns, dup and dbs no elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops._eager import unwatched
from lora_kernels.ops.gated_activation.problem import GatedActivationProblem, launcher

_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(
    "gated_activation_fwd(Tensor gate, Tensor? up, str kind, Tensor[] lora_as, str backend) -> "
    "(Tensor h, Tensor s)"
)
_library.define(
    "gated_activation_bwd(Tensor dh, Tensor gate, Tensor? up, str kind, Tensor[] lora_bs, "
    "Tensor? s, float[] scalings, str backend) -> "
    "(Tensor dgate, Tensor dup, Tensor ds, Tensor[] dbs)"
)


def _fwd(
    gate: Tensor, up: Tensor | None, kind: str, lora_as: list[Tensor], backend: str
) -> tuple[Tensor, Tensor]:
    if gate.numel() == 0:
        h, s = _fwd_fake(gate, up, kind, lora_as, backend)
        return h, s.zero_()
    module = launcher(GatedActivationProblem.of_fwd(gate, up, kind, lora_as), backend, "fwd")
    with without_autocast(gate.device.type):
        h, s = module.gated_activation_fwd(gate, up, kind, lora_as)
    return h.contiguous(), s.contiguous()


def _bwd(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    kind: str,
    lora_bs: list[Tensor],
    s: Tensor | None,
    scalings: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    if gate.numel() == 0:
        dgate, dup, ds, dbs = _bwd_fake(dh, gate, up, kind, lora_bs, s, scalings, backend)
        return dgate, dup, ds.zero_(), [d.zero_() for d in dbs]
    problem = GatedActivationProblem.of_bwd(gate, up, kind, lora_bs, s)
    module = launcher(problem, backend, "bwd")
    with without_autocast(gate.device.type):
        dgate, dup, ds, dbs = module.gated_activation_bwd(dh, gate, up, kind, lora_bs, s, scalings)
    return (
        dgate.contiguous(),
        gate.new_empty(0) if dup is None else dup.contiguous(),
        ds.contiguous(),
        [d.contiguous() for d in dbs],
    )


def _fwd_fake(
    gate: Tensor, up: Tensor | None, kind: str, lora_as: list[Tensor], backend: str
) -> tuple[Tensor, Tensor]:
    s = gate.new_empty(gate.shape[0], sum(a.shape[0] for a in lora_as))
    return gate.new_empty(gate.shape), s


def _bwd_fake(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    kind: str,
    lora_bs: list[Tensor],
    s: Tensor | None,
    scalings: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dup = gate.new_empty(0 if up is None else gate.shape)
    ds = dh.new_empty(dh.shape[0], sum(b.shape[1] for b in lora_bs))
    dbs = [] if s is None else [b.new_empty(b.shape) for b in lora_bs]
    return gate.new_empty(gate.shape), dup, ds, dbs


for _key in ("CPU", "CUDA"):
    _library.impl("gated_activation_fwd", _fwd, _key)
    _library.impl("gated_activation_bwd", _bwd, _key)
torch.library.register_fake("lora_kernels::gated_activation_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("lora_kernels::gated_activation_bwd", _bwd_fake, lib=_library)

_fwd_op = torch.ops.lora_kernels.gated_activation_fwd.default
_bwd_op = torch.ops.lora_kernels.gated_activation_bwd.default


def fwd(gate: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """``gated_activation_fwd``, past the dispatcher where nobody watches it."""
    return _fwd(gate, *args) if unwatched(gate) else _fwd_op(gate, *args)


def bwd(dh: Tensor, gate: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """``gated_activation_bwd``, likewise."""
    return _bwd(dh, gate, *args) if unwatched(dh, gate) else _bwd_op(dh, gate, *args)
