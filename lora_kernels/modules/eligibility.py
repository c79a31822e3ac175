"""What can become a LoRALinear, and which hyperparameters it takes."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.quant_linear import QuantLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPE_NAMES = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


def obstacle(module: nn.Module) -> str:
    """Why `module` cannot become a LoRALinear (QuantLoRALinear, if it is quantized); or empty."""
    if type(module) not in (nn.Linear, QuantLinear):
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"its type is {name}; accepted: exactly torch.nn.Linear or QuantLinear"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if any(getattr(module, name, None) for name in _HOOKS):
        return "it has hooks, which the new layer would not run"
    if type(module) is QuantLinear:
        sharded = type(module.weight.data) is not Tensor
        return "its weight is a shard; accepted: the whole matrix" if sharded else ""
    weight = module._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        kind = type(vars(module).get("weight", weight)).__name__
        return f"its weight is a {kind}; accepted: a plain torch.nn.Parameter"
    if weight.dim() != 2 or hasattr(weight, "ds_id"):
        return f"its weight has shape {list(weight.shape)}, a shard; accepted: the whole matrix"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}; accepted: {_DTYPE_NAMES}"
    return ""


def weight_shape(linear: nn.Linear) -> tuple[int, int]:
    """(out_features, in_features) of the matrix that is there, packed or not."""
    if isinstance(linear, QuantLinear):
        return linear.out_features, linear.in_features
    n, k = linear.weight.shape
    return n, k


def check_hyperparameters(r: object, alpha: object, dropout: object) -> None:
    """Raise InvalidArgumentError unless r >= 1, alpha is finite and > 0, 0 <= dropout <= 1."""
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise InvalidArgumentError(f"r={r!r}; accepted: an integer >= 1")
    if not _is_number(alpha) or alpha <= 0:  # type: ignore[operator]
        raise InvalidArgumentError(f"alpha={alpha!r}; accepted: a finite number > 0")
    if not _is_number(dropout) or not 0.0 <= dropout <= 1.0:  # type: ignore[operator]
        raise InvalidArgumentError(f"dropout={dropout!r}; accepted: a number from 0 to 1")


def check_dtype(dtype: object, argument: str) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise InvalidArgumentError(f"{argument}={dtype!r}; accepted: None, {_DTYPE_NAMES}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
