"""Shortcuts of plain eager mode: past the dispatcher, past the binding of arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_kernels._backends import cpu as library


def unwatched(*tensors: Tensor) -> bool:
    """Nobody watches the dispatcher: plain tensors of a CPU or a GPU, nothing traced, no modes or
    transforms. Crossing it from Python costs more than a small problem takes."""
    return (
        all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and all(t.device.type in ("cpu", "cuda") and not t.is_neg() for t in tensors)
    )


@functools.cache
def library_call(name: str) -> Callable[..., Any] | None:
    """A function of the compiled library that does the whole of a small thing at once, for what
    Python would spend on it: ``plan_stands`` (csrc/python/plain.h), and the calls of ops without
    gradients on the CPU (``*_eager``), which return None where they decline. None: not there."""
    module, _ = library.load()
    return getattr(module, name, None)


def apply_function(function: Any, *args: Any) -> tuple[Tensor, ...]:
    """``function.apply(*args)`` of an autograd function with a ``setup_context``. In plain eager
    mode without the binding of arguments to the signature, which torch does at each call for
    functorch and which costs more than a small problem takes (100 us for a group)."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if not torch.is_grad_enabled():
        return function.forward(*args)
    return super(torch.autograd.Function, function).apply(*args)
