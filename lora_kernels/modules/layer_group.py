"""Adapted layers of one input (q/k/v, gate/up) computed by one grouped call of the op.

The layers stay where they are and are called one by one, as before. The first of them that is
called computes the results of all; the others find theirs. What makes that safe is checked on
every call: the others were called with the very same tensor, unchanged, in the same modes. If one
was not, it computes by itself, and a group whose results go to waste is dissolved.

A norm in front may make S = x A^T of the group while it makes x (`wanted`, `offer`). It is used by
the next call of the group if that is with this very x, unchanged, in the same modes and over the
same A; else it is dropped. A group of one layer serves that alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from lora_kernels.modules.handed_shrink import Offers, Switch, Wanted, backend_for, usable
from lora_kernels.ops import grouped_lora_linear
from lora_kernels.ops.dora_linear import grouped_dora_linear
from lora_kernels.ops.quant_linear import QuantTensor, grouped_quant_lora_linear

_ATTRIBUTE = "_lora_kernels_group"
FEEDS = "_lora_kernels_feeds"
_MAX_MEMBERS = 8
_WASTED_AT_MOST = 2  # calls in a row that left results behind, as an exception may do once
_UNCLAIMED_AT_MOST = 8  # S in a row that no call took
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
        members: the layers, up to eight, in the order in which the block calls them.
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
        assert 1 <= len(members) <= _MAX_MEMBERS
        self.name, self.members, self.operands = name, members, operands
        self.adapted = list(adapted or [True] * len(members))
        self.dissolved = ""  # the reason, once it is
        self._wasted = 0
        self._pending: dict[int, _Pending] = {}  # per thread
        self.producer: nn.Module | None = None  # makes x, and S of it where `shrink` has it so
        self.shrink: Switch = False
        self._offers, self._unclaimed = Offers(), 0

    def __getstate__(self) -> dict[str, Any]:
        # copies and pickles hold no results
        return {**self.__dict__, "_pending": {}, "_offers": Offers()}

    def attach(self) -> None:
        for member in self.members:
            member.__dict__[_ATTRIBUTE] = self

    def detach(self) -> None:
        for member in self.members:
            if member.__dict__.get(_ATTRIBUTE) is self:
                del member.__dict__[_ATTRIBUTE]
        self._pending.clear()
        self.feed_from(None, False)

    def feed_from(self, producer: nn.Module | None, shrink: Switch) -> None:
        """From now on `producer` makes x of this group, and asks :meth:`wanted`; None: nobody."""
        if self.producer is not None and self.producer.__dict__.get(FEEDS) is self:
            del self.producer.__dict__[FEEDS]
        self.producer, self.shrink, self._unclaimed = producer, shrink, 0
        self._offers.clear()
        if producer is not None:
            producer.__dict__[FEEDS] = self

    def wanted(self, producer: nn.Module, x: Tensor) -> Wanted | None:
        """What `producer` has to make beside the tensor that it gives to this group; x stands for
        that: the same shape, dtype and place. None: nothing."""
        if self.dissolved or producer is not self.producer or torch.compiler.is_compiling():
            return None
        if any(has_hooks(member) for member in self.members):
            return None  # they may hand on another tensor, or arguments that need the layer itself
        found = self._found(x)
        joined = [o for o in found or () if isinstance(o, Operands)]
        lora_as = tuple(o.lora_a for o in joined if o.lora_a is not None)
        if not lora_as or any(o.dropout_p > 0.0 for o in joined) or not usable(x, lora_as):
            return None
        training = torch.is_grad_enabled()
        backend = backend_for(
            self.shrink, "norm_shrink", "fwdbwd" if training else "fwd", x, K=x.shape[-1],
            N=tuple(o.weight.shape[0] for o in joined if o.lora_a is not None),
            rank=tuple(a.shape[0] for a in lora_as), adapter_dtype=lora_as[0].dtype,
        )  # fmt: skip
        return Wanted(lora_as, backend) if backend else None

    def offer(self, y: Tensor, s: Tensor, lora_as: tuple[Tensor, ...]) -> None:
        """S of y and these A, for the next call in this thread; held no longer than y exists."""
        self._unclaimed += 1
        if self._unclaimed > _UNCLAIMED_AT_MOST:
            _logger.warning(
                "S = x A^T for the layers of %s is no longer made by the norm before them: they "
                "are called with another tensor than it returns", self.name
            )  # fmt: skip
            self.feed_from(None, False)
            return
        self._offers.put(y, s, lora_as, _state(y))

    def take(self, x: Tensor, joined: Sequence[AnyOperands]) -> Tensor | None:
        """S of x for a call with these operands, where it was offered for just that."""
        if self.producer is None or not self._offers:
            return None
        lora_as = [o.lora_a for o in joined if o.lora_a is not None]
        s = self._offers.take(x, lora_as, _state(x))
        if s is None or any(not isinstance(o, Operands) or o.dropout_p > 0.0 for o in joined):
            return None
        self._unclaimed = 0
        return s

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

    def _found(self, x: Tensor) -> list[AnyOperands | None] | None:
        """Operands of every member for x, None for one that stays out; None: no common call."""
        found: list[AnyOperands | None] = []
        for member, adapted in zip(self.members, self.adapted, strict=True):
            # A layer that fully_shard wrapped by itself is gathered in its own call only.
            alone = type(member).__name__.startswith("FSDP")
            operands = None if alone else self.operands(member, x)
            if operands is None and adapted:
                return None
            found.append(operands)
        first = next(o for o in found if o is not None and o.lora_a is not None)
        return found if all(agree(first, o) for o in found if o is not None) else None

    def _compute(self, x: Tensor) -> Results | None:
        found = self._found(x)
        if found is None:
            if self.producer is not None and not torch.compiler.is_compiling():
                self._offers.discard()
            return None
        joined = [o for o in found if o is not None]
        shrunk = (
            None if self.producer is None or torch.compiler.is_compiling() else self.take(x, joined)
        )
        if len(joined) < 2 and shrunk is None:
            return None
        outputs = iter(compute_together(x, joined, shrunk))
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


def compute_together(
    x: Tensor, found: Sequence[AnyOperands], shrunk: Tensor | None = None
) -> list[Tensor]:
    """One result per layer, of operands that agree; at least one has an adapter. `shrunk`: as the
    op has it, for dense layers."""
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
        x, weights, lora_as, lora_bs, scalings, biases=biases, dropout_p=max(rates), shrunk=shrunk
    )


def has_hooks(layer: nn.Module) -> bool:
    """Hooks of its own, or of all modules."""
    return any((
        layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks,
        layer._backward_pre_hooks, nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks, nn_module._global_backward_hooks,
        nn_module._global_backward_pre_hooks,
    ))  # fmt: skip


def fed_by(producer: nn.Module) -> LayerGroup | None:
    """The group that takes what this module makes."""
    return producer.__dict__.get(FEEDS)


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
