"""Whether a registered op may be called past the dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor


def unwatched(*tensors: Tensor) -> bool:
    """Nobody watches the dispatcher: plain tensors of a CPU or a GPU, nothing traced, no modes or
    transforms. Crossing it from Python costs more than a small problem takes."""
    return (
        all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and all(t.device.type in ("cpu", "cuda") for t in tensors)
    )
