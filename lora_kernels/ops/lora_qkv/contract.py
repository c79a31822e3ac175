"""The registered forward of lora_qkv: schema, implementation, fake. Torch only.

x is [M, K], M whole sequences of `sequence` positions; members are [M, N_g]. The backward is that
of rope, then that of lora_linear, both registered by themselves; autograd.py calls them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops.lora_qkv.problem import (
    LoraQkvProblem,
    backend_module,
    choose,
    inner_backend,
)

_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(
    "lora_qkv_fwd(Tensor x, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, "
    "Tensor?[] biases, float[] scalings, float dropout_p, Tensor? seed, Tensor cos, Tensor sin, "
    "Tensor? position_ids, int sequence, int head_dim, int[] rotated, bool interleaved, "
    "str backend) -> (Tensor[] ys, Tensor s)"
)


def _fwd(
    x: Tensor, weights: list[Tensor], lora_as: list[Tensor], lora_bs: list[Tensor],
    biases: list[Tensor | None], scalings: list[float], dropout_p: float, seed: Tensor | None,
    cos: Tensor, sin: Tensor, position_ids: Tensor | None, sequence: int, head_dim: int,
    rotated: list[int], interleaved: bool, backend: str,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    if x.shape[0] == 0:
        return _fwd_fake(
            x, weights, lora_as, lora_bs, biases, scalings, dropout_p, seed, cos, sin,
            position_ids, sequence, head_dim, rotated, interleaved, backend,
        )  # fmt: skip
    widths = [w.shape[0] // head_dim for w in weights]
    problem = LoraQkvProblem(
        M=x.shape[0], K=x.shape[1], H=widths[0], Hk=sum(widths[1:]) // 2, D=head_dim,
        R=cos.shape[-1], rank=max(a.shape[0] for a in lora_as), interleaved=interleaved,
        dtype=x.dtype, device=x.device.type, dropout_p=dropout_p, members=len(weights),
        frozen=sum(a.shape[0] == 0 for a in lora_as),
    )  # fmt: skip
    requested = None if backend == "auto" else backend
    name, _ = choose(problem, requested)
    with without_autocast(x.device.type):
        ys, s = backend_module(name).lora_qkv_fwd(
            x, weights, lora_as, lora_bs, biases, scalings, dropout_p, seed, cos, sin,
            position_ids, sequence, head_dim, rotated, interleaved, inner_backend(requested),
        )  # fmt: skip
    return ys, s


def _fwd_fake(
    x: Tensor, weights: list[Tensor], lora_as: list[Tensor], lora_bs: list[Tensor],
    biases: list[Tensor | None], scalings: list[float], dropout_p: float, seed: Tensor | None,
    cos: Tensor, sin: Tensor, position_ids: Tensor | None, sequence: int, head_dim: int,
    rotated: list[int], interleaved: bool, backend: str,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    ys = [x.new_empty(x.shape[0], w.shape[0]) for w in weights]
    return ys, x.new_empty(x.shape[0], sum(a.shape[0] for a in lora_as))


for _key in ("CPU", "CUDA"):
    _library.impl("lora_qkv_fwd", _fwd, _key)
torch.library.register_fake("lora_kernels::lora_qkv_fwd", _fwd_fake, lib=_library)

fwd = torch.ops.lora_kernels.lora_qkv_fwd.default
