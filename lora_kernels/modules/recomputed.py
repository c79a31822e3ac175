"""An intermediate result that is computed again in the backward instead of being kept for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _Recipe:
    """Stands for a tensor that has the values of the result in `shape`."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape


@contextmanager
def recomputed(result: Tensor, make: Callable[[], Tensor], *inputs: Tensor) -> Iterator[None]:
    """Inside, what autograd would save of `result` is made again by `make` when it is needed.

    `make` computes it from `inputs` alone, which are kept, and must not have been changed in place
    by then. Where saved tensors are somebody else's concern (checkpointing, offloading) or traced
    (torch.compile), nothing is done: the result is saved as usual.
    """
    if not _applies(result):
        yield
        return
    address, count = result.untyped_storage().data_ptr(), result.numel()
    versions = [t._version for t in inputs]

    def pack(t: Tensor) -> Any:
        same = t.untyped_storage().data_ptr() == address and t.numel() == count
        return _Recipe(t.shape) if same and t.is_contiguous() else t

    def unpack(saved: Any) -> Tensor:
        if not isinstance(saved, _Recipe):
            return saved
        if any(t._version != v for t, v in zip(inputs, versions, strict=True)):
            raise RuntimeError(
                "the inputs of an activation that is computed again in the backward have been "
                "changed in place; build the module with recompute=False"
            )
        with torch.no_grad():
            return make().view(saved.shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _applies(result: Tensor) -> bool:
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and result.requires_grad):
        return False
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(False) is None and result.is_contiguous()
