"""What trains is fp32 in a model of bf16."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def widen_trained(model: nn.Module) -> None:
    """Makes the parameters that train fp32; embeddings still pass on the dtype that they had."""
    narrow = {p for p in model.parameters() if p.requires_grad and p.dtype != torch.float32}
    for module in model.modules():  # tied weights are in several of them
        for parameter in narrow.intersection(module.parameters(recurse=False)):
            pass_on(module, parameter.dtype)
    for parameter in narrow:
        parameter.data = parameter.data.float()
    even_norms(model)


def even_norms(model: nn.Module) -> None:
    """Makes a norm fp32 where one of its vectors is: its kernel takes no mixture, not even under
    autocast, which casts what matrix products are given."""
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        if len({p.dtype for p in own}) > 1 and all(p.dim() <= 1 for p in own):
            for parameter in own:
                parameter.data = parameter.data.float()


def pass_on(module: nn.Module, dtype: torch.dtype) -> None:
    """Lets an embedding give `dtype`; other modules are left alone.

    Autocast leaves lookups alone, and the norm behind one would meet an input wider than its
    weights.
    """
    if isinstance(module, nn.Embedding):
        module.register_forward_hook(partial(_cast, dtype))


def _cast(dtype: torch.dtype, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.to(dtype)
