"""What is compared: the frozen layer, PEFT in three ways, the backends of lora_linear, and other
projects' kernels (peers.py).

A provider is built for one problem and gives the output, or the output and the gradients of x, A
and B. All of them work on the same tensors, so their results can be checked against one oracle.
A group (several layers of one input) gives one output per member.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.peers import UnavailableError
from lora_kernels.ops import _registry, grouped_lora_linear, lora_linear
from lora_kernels.ops.lora_linear import PaddedBlock, padded_lora_linear
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
    "triton": "lora_kernels triton",
    "cuda": "lora_kernels cuda",
    "triton-fp32": "lora_kernels triton, fp32 adapter",
    "cuda-fp32": "lora_kernels cuda, fp32 adapter",
    "aten-padded": "lora_kernels padded buffer",
    "unsloth": "Unsloth",
    "lorafusion": "LoRAFusion",
    "liger": "Liger",
}
# Providers that draw their dropout masks from another generator than the oracle.
FOREIGN = ("peft", "unsloth", "lorafusion", "liger")


@dataclass(frozen=True)
class Case:
    """One row of the benchmark."""

    M: int
    K: int
    N: int
    rank: int
    dtype: torch.dtype
    dropout_p: float = 0.0
    device: str = "cpu"
    others: tuple[int, ...] = ()  # out_features of the further members of a group

    @property
    def outs(self) -> tuple[int, ...]:
        return (self.N, *self.others)

    def inputs(self, adapter_dtype: torch.dtype | None = None) -> LoraLinearInputs:
        """No bias. The adapter has the same values in `adapter_dtype` as in the dtype of x."""
        i = lora_linear_inputs(
            self.M, self.K, self.outs, self.rank, self.dtype,
            bias=False, scaling=2.0, dropout_p=self.dropout_p, device=self.device,
        )  # fmt: skip
        if adapter_dtype is None:
            return i
        a, b = ([t.to(adapter_dtype) for t in ts] for ts in (i.lora_as, i.lora_bs))
        return replace(i, lora_as=a, lora_bs=b)

    def problem(self, adapter_dtype: torch.dtype | None = None) -> object:
        return _registry.find("lora_linear").problem(
            M=self.M, K=self.K, N=self.outs, rank=self.rank, dtype=self.dtype,
            adapter_dtype=adapter_dtype, dropout_p=self.dropout_p, device=self.device,
        )  # fmt: skip


@dataclass(frozen=True)
class Provider:
    """`layer(x)` is the forward, a tensor or one per member; `leaves` (x, all A, all B; of the
    frozen layer x) are differentiated by :meth:`bwd` and :meth:`fwdbwd`."""

    name: str
    inputs: LoraLinearInputs
    layer: Callable[[Tensor], Tensor | list[Tensor]]
    x: Tensor
    leaves: tuple[Tensor, ...]

    def outputs(self) -> list[Tensor]:
        made = self.layer(self.x)
        return [made] if isinstance(made, Tensor) else list(made)

    def fwd(self) -> list[Tensor]:
        """The forward of training: gradients are wanted, so backward operands are saved."""
        return self.outputs()

    def fwdbwd(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.outputs(), self.leaves, self.inputs.dys)

    @cached_property
    def _kept(self) -> list[Tensor]:
        return self.outputs()

    def bwd(self) -> tuple[Tensor, ...]:
        """The backward alone, of one forward that is kept."""
        return torch.autograd.grad(self._kept, self.leaves, self.inputs.dys, retain_graph=True)


def _frozen(case: Case) -> Provider:
    i = case.inputs()
    x, ws = i.x.requires_grad_(), i.weights
    if len(ws) == 1:
        return Provider("frozen", i, lambda t: F.linear(t, ws[0]), x, (x,))
    return Provider("frozen", i, lambda t: [F.linear(t, w) for w in ws], x, (x,))


def _peft_layer(i: LoraLinearInputs, member: int, dropout_p: float) -> nn.Module:
    try:
        from peft import LoraConfig
        from peft.tuners.lora import Linear
    except ImportError as error:
        raise UnavailableError(f"{error}; pip install peft") from error

    weight, a, b = i.weights[member], i.lora_as[member], i.lora_bs[member]
    (n, k), rank, scaling = weight.shape, a.shape[0], i.scalings[member]
    base = nn.Linear(k, n, bias=False, device="meta", dtype=weight.dtype)
    base.weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=round(scaling * rank), lora_dropout=dropout_p)
    layer = Linear(base, "default", config=config, r=rank, lora_alpha=config.lora_alpha)
    layer.lora_A["default"].weight = nn.Parameter(a)
    layer.lora_B["default"].weight = nn.Parameter(b)
    return layer.train()


def _peft(case: Case, name: str, adapter_dtype: torch.dtype | None, compiled: bool) -> Provider:
    i = case.inputs(adapter_dtype)
    layers = [_peft_layer(i, g, case.dropout_p) for g in range(len(case.outs))]
    x = i.x.requires_grad_()
    leaves = (
        x,
        *(layer.lora_A["default"].weight for layer in layers),
        *(layer.lora_B["default"].weight for layer in layers),
    )
    run: Callable[[Tensor], Tensor | list[Tensor]] = layers[0]
    if len(layers) > 1:

        def run(t: Tensor) -> list[Tensor]:
            return [layer(t) for layer in layers]

    if compiled and case.device != "cpu":
        # The backward alone is called many times on one forward; by default it may only be once.
        importlib.import_module("torch._functorch.config").donated_buffer = False
    return Provider(name, i, torch.compile(run) if compiled else run, x, leaves)


def op_layer(
    case: Case, i: LoraLinearInputs, leaves: tuple[Tensor, ...], backend: str, seed: int | None
) -> Callable[[Tensor], Tensor | list[Tensor]]:
    """lora_linear on one backend as a function of x."""
    n = len(case.outs)
    if n == 1:
        _, a, b = leaves

        def single(t: Tensor) -> Tensor:
            return lora_linear(
                t, i.weights[0], a, b, i.scalings[0],
                dropout_p=case.dropout_p, seed=seed, backend=backend,
            )  # fmt: skip

        return single

    def layer(t: Tensor) -> list[Tensor]:
        return grouped_lora_linear(
            t, i.weights, leaves[1 : 1 + n], leaves[1 + n :], i.scalings,
            dropout_p=case.dropout_p, seed=seed, backend=backend,
        )  # fmt: skip

    return layer


def _op(case: Case, name: str, backend: str, adapter_dtype: torch.dtype | None) -> Provider:
    able, why = _registry.find("lora_linear").supports(backend, case.problem())
    if not able:
        raise UnavailableError(why)
    i = case.inputs(adapter_dtype)
    leaves = tuple(t.requires_grad_() for t in (i.x, *i.lora_as, *i.lora_bs))
    return Provider(name, i, op_layer(case, i, leaves, backend, None), i.x, leaves)


@dataclass(frozen=True)
class PaddedProvider(Provider):
    """`x` is the padded rows that a producer of our own would write X into."""

    def _of_x(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (grads[0][:, : self.inputs.x.shape[1]], *grads[1:])

    def fwdbwd(self) -> tuple[Tensor, ...]:
        return self._of_x(super().fwdbwd())

    def bwd(self) -> tuple[Tensor, ...]:
        return self._of_x(super().bwd())


def padded_layer(
    case: Case, i: LoraLinearInputs, leaves: tuple[Tensor, ...], block: PaddedBlock,
    seed: int | None,
) -> Callable[[Tensor], list[Tensor]]:  # fmt: skip
    n = len(case.outs)

    def layer(rows: Tensor) -> list[Tensor]:
        return padded_lora_linear(
            rows, block, i.weights, leaves[1 : 1 + n], leaves[1 + n :], i.scalings,
            dropout_p=case.dropout_p, seed=seed,
        )  # fmt: skip

    return layer


def _padded(case: Case, name: str) -> Provider:
    """Checked with the oracle's mask: the padded layer draws the masks of the op."""
    i = case.inputs()
    block = PaddedBlock(i.weights, i.lora_as, i.lora_bs)
    rows = block.pad(i.x).detach()
    leaves = tuple(t.requires_grad_() for t in (rows, *i.lora_as, *i.lora_bs))
    layer = padded_layer(case, i, leaves, block, i.seed)
    return PaddedProvider(name, i, layer, rows, leaves)


def _peer(case: Case, name: str) -> Provider:
    i = case.inputs()
    leaves = tuple(t.requires_grad_() for t in (i.x, *i.lora_as, *i.lora_bs))
    return Provider(name, i, peers.layer(name, i), i.x, leaves)


def build(name: str, case: Case) -> Provider:
    """Raises UnavailableError with the reason, ValueError on an unknown name."""
    fp32 = torch.float32 if name.endswith("-fp32") else None
    if fp32 and case.dtype == torch.float32:
        raise UnavailableError("the adapter is fp32 already")
    if name == BASELINE:
        return _frozen(case)
    if name.startswith("peft"):
        return _peft(case, name, fp32, compiled=name == "peft-compile")
    if name in peers.PEERS:
        return _peer(case, name)
    if name == "aten-padded":
        return _padded(case, name)
    backend = name.removesuffix("-fp32")
    if backend not in _registry.find("lora_linear").backends or name not in LABELS:
        raise ValueError(f"provider={name!r} is unknown; accepted: {', '.join(LABELS)}")
    return _op(case, name, backend, fp32)


def undropped(provider: Provider, case: Case) -> Provider:
    """Others draw their masks from another generator: they are checked without dropout."""
    if not provider.name.startswith(FOREIGN) or case.dropout_p == 0.0:
        return provider
    return build(provider.name, replace(case, dropout_p=0.0))
