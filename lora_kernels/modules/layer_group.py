"""Adapted layers of one input (q/k/v, gate/up) computed by one grouped call of the op.

The layers stay where they are and are called one by one, as before. The first of them that is
called computes the results of all; the others find theirs. What makes that safe is checked on
every call: the others were called with the very same tensor, unchanged, in the same modes. If one
was not, it computes by itself, and a group whose results go to waste is dissolved.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.ops import grouped_lora_linear
from lora_kernels.ops.dora_linear import grouped_dora_linear
from lora_kernels.ops.quant_linear import QuantTensor, grouped_quant_lora_linear

_ATTRIBUTE = "_lora_kernels_group"
_MAX_MEMBERS = 8
_WASTED_AT_MOST = 2  # calls in a row that left results behind, as an exception may do once
_logger = logging.getLogger("lora_kernels")


class Operands(NamedTuple):
    """What the op needs of one layer for one call; one without an adapter has no A and no B."""

    weight: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: float
    bias: Tensor | None
    dropout_p: float


class QuantOperands(NamedTuple):
    """The same over a quantized weight. compute_dtype: x is converted to it and the result back;
    None: neither."""

    weight: QuantTensor
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    bias: Tensor | None
    dropout_p: float
    compute_dtype: torch.dtype | None


class DoraOperands(NamedTuple):
    """The same of a DoRA layer; without dropout only, under which such layers share nothing."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor
    scaling: float
    bias: Tensor | None


AnyOperands = Operands | QuantOperands | DoraOperands
Results = list["Tensor | None"]  # None: that layer computes by itself


class _Pending:
    """Results that were computed for `x` and not fetched yet; `outputs` None: the group declined,
    each layer computes by itself."""

    def __init__(self, x: Tensor, state: tuple[Any, ...], outputs: Results | None, left: range):
        self.x, self.state, self.outputs = x, state, outputs
        self.left = set(left)


class LayerGroup:
    """Layers that a block calls with one input.

    Args:
        name: path of the block, for messages.
        members: the layers, two to eight, in the order in which the block calls them.
        operands: (layer, x) -> its operands; None when the call has to be its own.
        adapted: which of the members have an adapter; None: all. One without an adapter starts no
            call that an earlier member did not start: that one may have been called in a way
            that only it can compute.
    """

    def __init__(
        self,
        name: str,
        members: list[nn.Module],
        operands: Callable[[Any, Tensor], AnyOperands | None],
        adapted: Sequence[bool] | None = None,
    ) -> None:
        assert 2 <= len(members) <= _MAX_MEMBERS
        self.name, self.members, self.operands = name, members, operands
        self.adapted = list(adapted or [True] * len(members))
        self.dissolved = ""  # the reason, once it is
        self._wasted = 0
        self._pending: dict[int, _Pending] = {}  # per thread

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": {}}  # copies and pickles hold no results

    def attach(self) -> None:
        for member in self.members:
            member.__dict__[_ATTRIBUTE] = self

    def detach(self) -> None:
        for member in self.members:
            if member.__dict__.get(_ATTRIBUTE) is self:
                del member.__dict__[_ATTRIBUTE]
        self._pending.clear()

    def call(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The result of `layer` for x; None when the layer has to compute it."""
        at = self._position(layer)
        if self.dissolved or at < 0 or not isinstance(x, Tensor):
            return None
        compiling = torch.compiler.is_compiling()
        if compiling and _inside_traced_region():
            return None
        key = 0 if compiling else threading.get_ident()
        state = _state(x)
        pending = self._pending.get(key)
        if pending is not None:
            if pending.x is x and pending.state == state and at in pending.left:
                return self._fetch(pending, at, key)
            del self._pending[key]
            if pending.outputs is not None:
                self._waste(at in pending.left)
                if self.dissolved:
                    return None
        if not self.adapted[at] and any(self.adapted[:at]):
            return None
        outputs = self._compute(x)
        if outputs is None and not self.adapted[at]:
            return None  # not kept: nobody else may come
        first = 0 if outputs is not None else at
        pending = _Pending(x, state, outputs, range(first, len(self.members)))
        self._pending[key] = pending
        return self._fetch(pending, at, key)

    def _position(self, layer: nn.Module) -> int:
        for i, member in enumerate(self.members):
            if member is layer:
                return i
        return -1  # a replica of torch.nn.DataParallel

    def _fetch(self, pending: _Pending, at: int, key: int) -> Tensor | None:
        pending.left.remove(at)
        if not pending.left:
            del self._pending[key]
            self._wasted = 0
        return None if pending.outputs is None else pending.outputs[at]

    def _waste(self, other_input: bool) -> None:
        """Results were left behind. A layer that got another input shows that this is no group."""
        self._wasted += 1
        if other_input:
            self.dissolved = "its layers were called with different inputs"
        elif self._wasted >= _WASTED_AT_MOST:
            self.dissolved = "not all of its layers were called"
        if self.dissolved:
            self._pending.clear()
            _logger.warning(
                "the layers of %s are no longer computed together: %s", self.name, self.dissolved
            )

    def _compute(self, x: Tensor) -> Results | None:
        found: list[AnyOperands | None] = []
        for member, adapted in zip(self.members, self.adapted, strict=True):
            # A layer that fully_shard wrapped by itself is gathered in its own call only.
            alone = type(member).__name__.startswith("FSDP")
            operands = None if alone else self.operands(member, x)
            if operands is None and adapted:
                return None
            found.append(operands)
        joined = [o for o in found if o is not None]
        first = next(o for o in joined if o.lora_a is not None)
        if len(joined) < 2 or not all(agree(first, o) for o in joined):
            return None
        outputs = iter(compute_together(x, joined))
        return [None if o is None else next(outputs) for o in found]


def agree(a: AnyOperands, b: AnyOperands) -> bool:
    """One call can compute both."""
    if type(a) is not type(b):
        return False
    if isinstance(a, QuantOperands) or isinstance(b, QuantOperands):
        return a[-2:] == b[-2:]  # dropout_p, compute_dtype
    if a.weight.dtype != b.weight.dtype:
        return False
    if a.lora_a is None or a.lora_b is None or b.lora_a is None or b.lora_b is None:
        return True
    rates = [o.dropout_p for o in (a, b) if isinstance(o, Operands)]
    return (
        len(set(rates)) < 2
        and a.lora_a.dtype == b.lora_a.dtype
        and a.lora_b.dtype == b.lora_b.dtype
    )


def compute_together(x: Tensor, found: Sequence[AnyOperands]) -> list[Tensor]:
    """One result per layer, of operands that agree; at least one has an adapter."""
    first = found[0]
    if isinstance(first, QuantOperands):
        qs, lora_as, lora_bs, scalings, biases, rates, dtypes = zip(*found, strict=True)
        ys = grouped_quant_lora_linear(
            x, qs, lora_as, lora_bs, scalings, biases=biases, dropout_p=rates[0],
            compute_dtype=dtypes[0],
        )  # fmt: skip
        return ys if first.compute_dtype is None else [y.to(x.dtype) for y in ys]
    if isinstance(first, DoraOperands):
        weights, lora_as, lora_bs, magnitudes, scalings, biases = zip(*found, strict=True)
        return grouped_dora_linear(
            x, weights, lora_as, lora_bs, magnitudes, scalings, biases=biases
        )
    weights, lora_as, lora_bs, scalings, biases, rates = zip(*found, strict=True)
    return grouped_lora_linear(
        x, weights, lora_as, lora_bs, scalings, biases=biases, dropout_p=max(rates)
    )


def group_of(layer: nn.Module) -> LayerGroup | None:
    return layer.__dict__.get(_ATTRIBUTE)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _inside_traced_region() -> bool:
    """Whether what is being traced is the body of a checkpoint or another higher-order op, in which
    torch.compile allows no state to be kept from one layer to the next. Runs at trace time."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx().output.current_tracer.parent is not None
    except (ImportError, AttributeError):
        return True


def _state(x: Tensor) -> tuple[Any, ...]:
    """All that may change between two calls with one tensor and would change a result."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return (
        0 if torch.compiler.is_compiling() or x.is_inference() else x._version,
        torch.is_grad_enabled(),
        torch.get_autocast_dtype(device) if autocast else None,
    )
