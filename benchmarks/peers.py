"""Other projects' LoRA linear, for the benchmark: built lazily, skipped with the reason.

unsloth     unsloth.kernels.fast_lora.LoRA_W(X [b, s, K], W, quant_state, A, B, scaling);
            no dropout. Importing unsloth changes classes of transformers and PEFT.
lorafusion  lorafusion.ops.lora_v1.fused_linear_lora(x [b, s, K], W, A, B, scaling)
liger       has no LoRA linear (as of liger-kernel 0.8)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lora_kernels.testing import LoraLinearInputs

PEERS = ("unsloth", "lorafusion", "liger")
Layer = Callable[[Tensor], Tensor | list[Tensor]]


class UnavailableError(RuntimeError):
    """A provider cannot run here; the message is the reason."""


def load(module: str, name: str) -> Any:
    """An attribute of a package that may be absent or fail while it is imported."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UnavailableError(f"{module}.{name} cannot be imported: {text[:200]}") from error


def layer(name: str, i: LoraLinearInputs) -> Layer:
    """The peer's layer on the tensors of `i`; raises UnavailableError with the reason."""
    if name == "liger":
        raise UnavailableError("liger-kernel has no LoRA linear")
    if not i.x.is_cuda:
        raise UnavailableError(f"{name} needs a GPU")
    members = list(zip(i.weights, i.lora_as, i.lora_bs, i.scalings, strict=True))
    if name == "unsloth":
        if i.dropout_p:
            raise UnavailableError("unsloth leaves its kernels when there is dropout")
        apply = load("unsloth.kernels.fast_lora", "LoRA_W").apply

        def one(x: Tensor, w: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
            return apply(x, w, None, a, b, s)
    else:
        fused = load("lorafusion.ops.lora_v1", "fused_linear_lora")

        def one(x: Tensor, w: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
            return fused(x, w, a, b, s, dropout_p=i.dropout_p)

    def run(x: Tensor) -> list[Tensor]:
        return [one(x.unsqueeze(0), *member).squeeze(0) for member in members]

    return run
