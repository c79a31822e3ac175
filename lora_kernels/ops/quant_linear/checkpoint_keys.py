"""Reading single tensors out of a state dict, with one-line errors that name the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from lora_kernels.errors import QuantizedWeightError


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Reader:
    """The keys of one layer; `used` collects those that were read."""

    def __init__(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        self.state_dict, self.prefix = state_dict, prefix
        self.used: set[str] = set()

    def has(self, name: str) -> bool:
        return self.prefix + name in self.state_dict

    def fail(self, name: str, problem: str) -> NoReturn:
        raise QuantizedWeightError(f"{self.prefix}{name} {problem}")

    def tensor(self, name: str, dtypes: tuple[torch.dtype, ...], dim: int | None = None) -> Tensor:
        """The tensor at `name`, detached; its dtype and number of axes checked."""
        t = self.state_dict.get(self.prefix + name)
        if t is None:
            self.fail(name, "is missing")
        if not isinstance(t, Tensor):
            self.fail(name, f"is a {type(t).__name__}; accepted: a tensor")
        if t.dtype not in dtypes:
            accepted = ", ".join(map(dtype_name, dtypes))
            self.fail(name, f"has dtype {dtype_name(t.dtype)}; accepted: {accepted}")
        if dim is not None and t.dim() != dim:
            self.fail(name, f"has shape {list(t.shape)}; accepted: {dim} axes")
        self.used.add(self.prefix + name)
        return t.detach()

    def check_shape(self, name: str, t: Tensor, shape: tuple[int, ...], why: str) -> Tensor:
        """`t` if it has `shape`."""
        if tuple(t.shape) != shape:
            self.fail(name, f"has shape {list(t.shape)}; {why} needs {list(shape)}")
        return t

    def check_finite(self, name: str, t: Tensor) -> None:
        if not t.is_meta and t.numel() and not bool(torch.isfinite(t).all()):
            self.fail(name, f"has {int((~torch.isfinite(t)).sum())} NaN or infinite values")
