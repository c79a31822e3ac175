"""What is compared: the frozen layer, PEFT in three ways, and the backends of lora_linear.

A provider is built for one problem and gives the output, or the output and the gradients of x, A
and B. All of them work on the same tensors, so their results can be checked against one oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.ops import _registry, lora_linear
from lora_kernels.testing import LoraLinearInputs, lora_linear_inputs

BASELINE = "frozen"
DEFAULT = ("frozen", "peft", "peft-fp32", "peft-compile", "aten", "cpu")
LABELS = {
    "frozen": "frozen nn.Linear",
    "peft": "PEFT eager",
    "peft-fp32": "PEFT eager, fp32 adapter",
    "peft-compile": "torch.compile(PEFT)",
    "reference": "lora_kernels reference",
    "aten": "lora_kernels aten",
    "cpu": "lora_kernels cpu",
    "aten-fp32": "lora_kernels aten, fp32 adapter",
    "cpu-fp32": "lora_kernels cpu, fp32 adapter",
}


@dataclass(frozen=True)
class Case:
    """One row of the benchmark."""

    M: int
    K: int
    N: int
    rank: int
    dtype: torch.dtype
    dropout_p: float = 0.0

    def inputs(self, adapter_dtype: torch.dtype | None = None) -> LoraLinearInputs:
        """No bias. The adapter has the same values in `adapter_dtype` as in the dtype of x."""
        i = lora_linear_inputs(
            self.M, self.K, self.N, self.rank, self.dtype,
            bias=False, scaling=2.0, dropout_p=self.dropout_p,
        )  # fmt: skip
        if adapter_dtype is None:
            return i
        a, b = ([t.to(adapter_dtype) for t in ts] for ts in (i.lora_as, i.lora_bs))
        return replace(i, lora_as=a, lora_bs=b)

    def problem(self) -> object:
        return _registry.find("lora_linear").problem(
            M=self.M, K=self.K, N=self.N, rank=self.rank, dtype=self.dtype,
            dropout_p=self.dropout_p,
        )  # fmt: skip


@dataclass(frozen=True)
class Provider:
    """`layer(x)` is the forward; `leaves` are differentiated by :meth:`fwdbwd`."""

    name: str
    inputs: LoraLinearInputs
    layer: Callable[[Tensor], Tensor]
    x: Tensor
    leaves: tuple[Tensor, ...]

    def fwd(self) -> Tensor:
        """The forward of training: gradients are wanted, so backward operands are saved."""
        return self.layer(self.x)

    def fwdbwd(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.layer(self.x), self.leaves, self.inputs.dys[0])


class UnavailableError(RuntimeError):
    """A provider cannot run here; the message is the reason."""


def _frozen(case: Case) -> Provider:
    i = case.inputs()
    x, w = i.x.requires_grad_(), i.weights[0]
    return Provider("frozen", i, lambda t: F.linear(t, w), x, (x,))


def _peft_layer(i: LoraLinearInputs, dropout_p: float) -> nn.Module:
    try:
        from peft import LoraConfig
        from peft.tuners.lora import Linear
    except ImportError as error:
        raise UnavailableError(f"{error}; pip install peft") from error

    (n, k), rank = i.weights[0].shape, i.lora_as[0].shape[0]
    base = nn.Linear(k, n, bias=False, device="meta", dtype=i.weights[0].dtype)
    base.weight = nn.Parameter(i.weights[0], requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=round(i.scalings[0] * rank), lora_dropout=dropout_p)
    layer = Linear(base, "default", config=config, r=rank, lora_alpha=config.lora_alpha)
    layer.lora_A["default"].weight = nn.Parameter(i.lora_as[0])
    layer.lora_B["default"].weight = nn.Parameter(i.lora_bs[0])
    return layer.train()


def _peft(case: Case, name: str, adapter_dtype: torch.dtype | None, compiled: bool) -> Provider:
    i = case.inputs(adapter_dtype)
    layer = _peft_layer(i, case.dropout_p)
    x = i.x.requires_grad_()
    leaves = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return Provider(name, i, torch.compile(layer) if compiled else layer, x, leaves)


def _op(case: Case, name: str, backend: str, adapter_dtype: torch.dtype | None) -> Provider:
    able, why = _registry.find("lora_linear").supports(backend, case.problem())
    if not able:
        raise UnavailableError(why)
    i = case.inputs(adapter_dtype)
    x, w = i.x.requires_grad_(), i.weights[0]
    a, b = (t.requires_grad_() for t in (i.lora_as[0], i.lora_bs[0]))

    def layer(t: Tensor) -> Tensor:
        return lora_linear(t, w, a, b, i.scalings[0], dropout_p=case.dropout_p, backend=backend)

    return Provider(name, i, layer, x, (x, a, b))


def build(name: str, case: Case) -> Provider:
    """Raises UnavailableError with the reason, ValueError on an unknown name."""
    fp32 = torch.float32 if name.endswith("-fp32") else None
    if fp32 and case.dtype == torch.float32:
        raise UnavailableError("the adapter is fp32 already")
    if name == BASELINE:
        return _frozen(case)
    if name.startswith("peft"):
        return _peft(case, name, fp32, compiled=name == "peft-compile")
    backend = name.removesuffix("-fp32")
    if backend not in _registry.find("lora_linear").backends or name not in LABELS:
        raise ValueError(f"provider={name!r} is unknown; accepted: {', '.join(LABELS)}")
    return _op(case, name, backend, fp32)


def undropped(provider: Provider, case: Case) -> Provider:
    """PEFT draws its masks from another generator: it is checked without dropout."""
    if not provider.name.startswith("peft") or case.dropout_p == 0.0:
        return provider
    return build(provider.name, replace(case, dropout_p=0.0))
