"""The registered op pair of rope: schema, implementation, fake. Torch only.

Both take the tensors that share positions as a list, q and k in one call; they are each other's
transpose. Deliberately not differentiable; autograd.py wraps them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops._eager import unwatched
from lora_kernels.ops.rope import validate
from lora_kernels.ops.rope.problem import RopeProblem, launcher

_ARGUMENTS = "Tensor cos, Tensor sin, Tensor? position_ids, bool interleaved, str backend"
_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(f"rope_fwd(Tensor[] heads, {_ARGUMENTS}) -> Tensor[]")
_library.define(f"rope_bwd(Tensor[] grads, {_ARGUMENTS}) -> Tensor[]")


def problem_of(heads: list[Tensor], cos: Tensor, interleaved: bool) -> RopeProblem:
    q = heads[0]
    return RopeProblem(
        B=q.shape[0] if q.dim() == 4 else 1, S=q.shape[-3], H=q.shape[-2], D=q.shape[-1],
        Hk=sum(t.shape[-2] for t in heads[1:]), R=cos.shape[-1], interleaved=interleaved,
        dtype=q.dtype, device=q.device.type,
    )  # fmt: skip


def _fwd(
    heads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    validate.check_values(position_ids, cos.shape[0])
    module = launcher(problem_of(heads, cos, interleaved), backend, "fwd")
    return [t.contiguous() for t in module.rope_fwd(heads, cos, sin, position_ids, interleaved)]


def _bwd(
    grads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    validate.check_values(position_ids, cos.shape[0])
    module = launcher(problem_of(grads, cos, interleaved), backend, "bwd")
    return [t.contiguous() for t in module.rope_bwd(grads, cos, sin, position_ids, interleaved)]


def _fake(
    heads: list[Tensor], cos: Tensor, sin: Tensor, position_ids: Tensor | None,
    interleaved: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape) for t in heads]


for _key in ("CPU", "CUDA"):
    _library.impl("rope_fwd", _fwd, _key)
    _library.impl("rope_bwd", _bwd, _key)
torch.library.register_fake("lora_kernels::rope_fwd", _fake, lib=_library)
torch.library.register_fake("lora_kernels::rope_bwd", _fake, lib=_library)

_fwd_op = torch.ops.lora_kernels.rope_fwd.default
_bwd_op = torch.ops.lora_kernels.rope_bwd.default


def fwd(heads: list[Tensor], *args: Any) -> list[Tensor]:
    """The registered forward op, called directly where nothing can tell the difference."""
    return _fwd(heads, *args) if unwatched(*heads) else _fwd_op(heads, *args)


def bwd(grads: list[Tensor], *args: Any) -> list[Tensor]:
    """The registered backward op, likewise."""
    return _bwd(grads, *args) if unwatched(*grads) else _bwd_op(grads, *args)
