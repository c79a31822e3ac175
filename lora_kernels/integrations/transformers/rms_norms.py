"""RMS norms of transformers' models and torch.nn.RMSNorm on the fused op: a class swap."""

from __future__ import annotations

import functools
import os
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.errors import BackendUnavailableError
from lora_kernels.integrations.transformers.rms_norm_classes import INPUT, WEIGHT, Norm, row_of
from lora_kernels.modules.layer_group import FEEDS, fed_by
from lora_kernels.modules.report import FUSED, STOCK
from lora_kernels.ops import _dispatch, explain, rms_norm
from lora_kernels.ops._eager import library_call

KIND = "rms_norm"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HALF = (torch.bfloat16, torch.float16)
_ROWS = 1024  # of the problem for which the report names a backend


class FusedRmsNorm:
    """Mark of the subclasses that :func:`fuse_norms` makes; no state of its own."""

    _lora_kernels_stock: Any

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles name the stock class: the subclass is made where they are read."""
        return _empty, (self._lora_kernels_stock,), dict(self.__dict__)


def fuse_norms(
    model: nn.Module, enabled: bool = True
) -> tuple[list[dict[str, Any]], list[nn.Module]]:
    """(an entry of the report for every norm of the table, the norms whose class changed).

    A norm that cannot run on the op, or none where `enabled` is False, gets its own class back. One
    that makes S for the layers behind it runs on the op whether or not that alone would pay.
    """
    if not enabled:
        return [], [m for m in model.modules() if to_stock(m)]
    entries, changed = [], []
    for name, module in model.named_modules():
        if not is_norm(module):
            continue
        reason, backend = look_at(module, fed_by(module) is not None)
        later = getattr(module._parameters.get("weight"), "is_meta", False)  # decided on the call
        if to_stock(module) if reason and not later else _swap(module):
            changed.append(module)
        entries.append({
            "kind": KIND, "name": name, "status": STOCK if reason else FUSED, "reason": reason,
            "backend": backend,
        })  # fmt: skip
    return entries, changed


def swap_back(module: nn.Module) -> bool:
    """Undo one change of :func:`fuse_norms`; False for any other module."""
    return to_stock(module) or _swap(module)


def to_stock(module: nn.Module) -> bool:
    """Give a norm its own class back; False for any other module."""
    cls: Any = type(module)
    if not issubclass(cls, FusedRmsNorm):
        return False
    stock, fused = cls._lora_kernels_stock, _plain(cls)
    for key, value in module.__dict__.items():
        # accelerate keeps the method it wraps on the instance; it has to follow the class
        if getattr(value, "__func__", None) is _forward:
            module.__dict__[key] = MethodType(stock.forward, module)
    if cls is not fused:  # fully_shard's subclass of it
        kept = {k: v for k, v in cls.__dict__.items() if k == "__deepcopy__"}
        stock = type(f"FSDP{stock.__name__}", (*cls.__bases__[:-1], stock), kept)
    module.__class__ = stock
    return True


def _swap(module: nn.Module) -> bool:
    cls: Any = type(module)
    if issubclass(cls, FusedRmsNorm) or row_of(cls) is None:
        return False
    module.__class__ = _fused_class(cls)
    return True


def _plain(cls: Any) -> Any:
    """The class that fully_shard made its subclass from."""
    if cls.__name__.startswith("FSDP") and cls.__bases__[0].__name__ == "FSDPModule":
        return cls.__bases__[-1]
    return cls


def _stock_of(cls: Any) -> Any:
    return cls._lora_kernels_stock if issubclass(cls, FusedRmsNorm) else cls


def is_norm(module: nn.Module) -> bool:
    """Of a class of the table, fused or not."""
    return row_of(_plain(_stock_of(type(module)))) is not None


def look_at(module: nn.Module, feeds: bool = False) -> tuple[str, str]:
    """(why a call would run the norm's own forward, backend of a call that would not). feeds: it
    makes S for layers behind it, so that the op need not pay by itself."""
    if _dispatch.disabled(KIND, "apply"):
        return "disabled by LORA_KERNELS_DISABLE", ""
    cls = type(module)
    if not issubclass(cls, FusedRmsNorm) and cls.__name__.startswith("FSDP"):
        return "the norm is wrapped by fully_shard", ""
    if "forward" in module.__dict__:
        return "the norm has a forward of its own on the instance", ""
    weight = module._parameters.get("weight")
    shape = getattr(module, "normalized_shape", None)
    if shape is not None and len(shape) != 1:
        return f"it normalizes over {len(shape)} axes", ""
    if weight is None:
        return ("", "") if shape is not None else ("it has no parameter named weight", "")
    if weight.dim() != 1:
        return f"its weight has shape {list(weight.shape)}", ""
    if weight.is_meta:
        return "its weight is on the meta device", ""
    if weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype}", ""
    told = _choice(_ROWS, weight.numel(), weight.dtype, weight.dtype, weight.device.type)
    if not (feeds and told[0] and weight.device.type in ("cpu", "cuda")):
        return told
    return "", str(
        explain(
            KIND, M=_ROWS, K=weight.numel(), dtype=weight.dtype, device=weight.device.type
        )["backend"]
    )  # fmt: skip


def _choice(
    rows: int, features: int, dtype: torch.dtype, weight_dtype: torch.dtype | None, device: str
) -> tuple[str, str]:
    """(why the model's own composition runs, backend of the op where it does not)."""
    environ = os.environ
    return _cached_choice(
        1 << (rows - 1).bit_length() if device != "cpu" and rows else 1,
        features, dtype, weight_dtype, device,
        environ.get("LORA_KERNELS_BACKEND", ""), environ.get("LORA_KERNELS_DISABLE", ""),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _cached_choice(
    rows: int, features: int, dtype: torch.dtype, weight_dtype: torch.dtype | None, device: str,
    requested: str, disabled: str,
) -> tuple[str, str]:  # fmt: skip
    if device not in ("cpu", "cuda"):
        return f"it is on {device}", ""
    if _dispatch.disabled(KIND, "apply"):
        return "disabled by LORA_KERNELS_DISABLE", ""
    try:
        told = explain(
            KIND, M=rows, K=features, dtype=dtype, weight_dtype=weight_dtype, device=device
        )
    except BackendUnavailableError as error:
        return str(error), ""
    backend = str(told["backend"])
    if backend == "aten" and requested in ("", "auto"):
        return f"no kernel beats the model's own: {told['reason']}", ""
    return "", backend


def _can_run(module: Any, x: Any, weight: Any) -> bool:
    """Nothing but plain eager mode, and a problem that the op takes."""
    if (
        torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or type(x) not in (Tensor, nn.Parameter)
        or x.dtype not in _DTYPES
        or x.dim() == 0
    ):
        return False
    device, features = x.device.type, x.shape[-1]
    if "normalized_shape" in module.__dict__:
        # torch decides by policy what autocast does to it; several axes are its own business.
        if torch.is_autocast_enabled(device) or tuple(module.normalized_shape) != (features,):
            return False
    elif weight is None:
        return False
    if weight is not None and (
        type(weight) is not nn.Parameter
        or weight.dtype not in _DTYPES
        or weight.shape != (features,)
        or weight.device != x.device
    ):
        return False
    return features > 0 and x.numel() > 0


def _pays(x: Tensor, weight: Tensor | None) -> bool:
    """A kernel was chosen for this problem."""
    features = x.shape[-1]
    dtype = None if weight is None else weight.dtype
    return not _choice(x.numel() // features, features, x.dtype, dtype, x.device.type)[0]


def _eager(x: Any, weight: Any, eps: Any, offset: float) -> Tensor | None:
    """What a call without gradients on the CPU comes to where it is the op's with a weight in the
    dtype of x; None: whoever looks closer decides."""
    call = library_call("rms_norm_eager")
    if call is None or weight is None or type(eps) is not float:
        return None
    if type(x) is not Tensor or weight.dtype != x.dtype:
        return None
    y: Tensor | None = call(x, weight, eps, offset)
    return y


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    stock = _stock_of(type(self))
    if torch.compiler.is_compiling():
        return stock.forward(self, *args, **kwargs)  # the compiler fuses it with what is around
    x = args[0] if len(args) == 1 and not kwargs else None
    norm: Norm | None = row_of(stock)
    weight = self._parameters.get("weight")
    if norm is not None and x is not None and FEEDS not in self.__dict__:
        made = _eager(x, weight, getattr(self, norm.eps), norm.offset)
        if made is not None:
            return made
    if norm is None or x is None or not _can_run(self, x, weight):
        return stock.forward(self, *args, **kwargs)
    group = self.__dict__.get(FEEDS)
    wanted = None
    if group is not None and (weight is None or weight.dtype == x.dtype or norm.result == INPUT):
        wanted = group.wanted(self, x)
    if wanted is None and not _pays(x, weight):
        return stock.forward(self, *args, **kwargs)
    eps = getattr(self, norm.eps)
    if eps is None:  # torch.nn.RMSNorm: of the dtype it computes in
        eps = torch.finfo(torch.float32).eps
    if not isinstance(eps, float):
        return stock.forward(self, *args, **kwargs)
    if wanted is not None:
        values = [a.detach() for a in wanted.lora_as]
        y, s = rms_norm(
            x, weight, eps, norm.offset, lora_as=values, backend=wanted.backend
        )  # fmt: skip
        group.offer(y, s, wanted.lora_as)
        return y
    if weight is not None and norm.result != INPUT and weight.dtype != x.dtype:
        x = x.to(torch.float32)
    y = rms_norm(x, weight, eps, norm.offset)
    if norm.result == WEIGHT and weight.dtype in _HALF:
        y = y.to(weight.dtype)  # type: ignore[union-attr]
    return y


@functools.cache
def _fused_class(cls: Any) -> Any:
    """A subclass of exactly `cls` that prints as it."""
    return type(
        cls.__name__, (FusedRmsNorm, cls),
        {
            "forward": _forward, "_lora_kernels_stock": cls, "__module__": cls.__module__,
            "__qualname__": cls.__qualname__, "__doc__": cls.__doc__,
        },
    )  # fmt: skip


def _empty(stock: Any) -> Any:
    """A fused norm without state, for copies and pickles."""
    cls = _fused_class(stock)
    return cls.__new__(cls)
