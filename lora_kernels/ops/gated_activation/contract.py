"""The registered op pair of gated_activation: schema, implementation, fake. Torch only.

Deliberately not differentiable; autograd.py wraps it. Everything here is 2-D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops.gated_activation.problem import GatedActivationProblem, launcher

_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define("gated_activation_fwd(Tensor gate, Tensor? up, str kind, str backend) -> Tensor")
_library.define(
    "gated_activation_bwd(Tensor dh, Tensor gate, Tensor? up, str kind, str backend) -> "
    "(Tensor dgate, Tensor dup)"
)


def _problem(gate: Tensor, up: Tensor | None, kind: str) -> GatedActivationProblem:
    return GatedActivationProblem(
        gate.shape[0], gate.shape[1], kind, up is not None, gate.dtype, gate.device.type
    )


def _fwd(gate: Tensor, up: Tensor | None, kind: str, backend: str) -> Tensor:
    if gate.numel() == 0:
        return gate.new_empty(gate.shape)
    module = launcher(_problem(gate, up, kind), backend)
    return module.gated_activation_fwd(gate, up, kind).contiguous()


def _bwd(
    dh: Tensor, gate: Tensor, up: Tensor | None, kind: str, backend: str
) -> tuple[Tensor, Tensor]:
    if gate.numel() == 0:
        return _bwd_fake(dh, gate, up, kind, backend)
    module = launcher(_problem(gate, up, kind), backend)
    dgate, dup = module.gated_activation_bwd(dh, gate, up, kind)
    return dgate.contiguous(), gate.new_empty(0) if dup is None else dup.contiguous()


def _fwd_fake(gate: Tensor, up: Tensor | None, kind: str, backend: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _bwd_fake(
    dh: Tensor, gate: Tensor, up: Tensor | None, kind: str, backend: str
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else gate.shape)


for _key in ("CPU", "CUDA"):
    _library.impl("gated_activation_fwd", _fwd, _key)
    _library.impl("gated_activation_bwd", _bwd, _key)
torch.library.register_fake("lora_kernels::gated_activation_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("lora_kernels::gated_activation_bwd", _bwd_fake, lib=_library)

fwd = torch.ops.lora_kernels.gated_activation_fwd.default
bwd = torch.ops.lora_kernels.gated_activation_bwd.default
