"""Settles which kernel of MKL serves each element-wise function, before two threads ask at once.

MKL chooses the kernel of a vector function when it is first called. Where that first call comes
from several threads, as in torch's first exp or tanh of a process, MKL before 2025.0 may run a
low-accuracy kernel for one thread's part of that call: relative errors up to 1e-2, gone in the next
call (pytorch issue 188792). One element is computed by one thread, and settles it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.acos, torch.asin, torch.atan, torch.cos, torch.cosh, torch.erf, torch.erfc, torch.erfinv,
    torch.exp, torch.expm1, torch.lgamma, torch.log, torch.log10, torch.log1p, torch.log2,
    torch.sin, torch.sinh, torch.sqrt, torch.tan, torch.tanh,
)  # fmt: skip


def settle() -> None:
    """Calls each function once on one element, in fp32 and fp64, on the CPU."""
    if not torch.backends.mkl.is_available():
        return
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            one = torch.full((1,), 0.5, dtype=dtype, device="cpu")
            for function in _FUNCTIONS:
                function(one)
