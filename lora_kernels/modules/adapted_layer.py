"""What the adapted layers other than LoRALinear share: scaling, switches, merging, factors.

Such a layer is a subclass of the torch layer that it replaces, with the same keys for weight and
bias, and holds its factors as parameters of its own.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.eligibility import check_dtype, check_hyperparameters

_ORIGINAL = "original."


class AdaptedLayer(nn.Module):
    """Mixin; a subclass names its factors and says what their update of each weight is.

    Attributes:
        r, alpha, dropout, rslora, scaling: as in :class:`lora_kernels.LoRALinear`.
        dora: always False; these layers have no DoRA.
        merged: the update is in the weights, and the forward is the plain layer's.
        adapter_enabled: False gives the plain layer.
    """

    r: int
    alpha: float
    dropout: float
    rslora: bool
    merged: bool
    adapter_enabled: bool
    dora = False

    def _begin_adapter(self, r: int, alpha: float, dropout: float, rslora: bool) -> None:
        """Before the factors are made; freezes what is there."""
        self.r, self.alpha, self.dropout, self.rslora = r, alpha, float(dropout), bool(rslora)
        self.merged, self.adapter_enabled = False, True
        self._unmerge_state: dict[str, Tensor] = {}
        self.requires_grad_(False)

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def factors(self) -> dict[str, nn.Parameter]:
        """Ending of the name in an adapter file -> parameter, A before B."""
        raise NotImplementedError

    def updates(self) -> dict[str, Tensor]:
        """Name of a weight -> its update scaling * B A, in the shape of the weight, in fp32 or
        fp64, without a graph."""
        raise NotImplementedError

    def reset_adapter(self) -> None:
        """Start the adapter anew: one factor random, the other zero."""
        raise NotImplementedError

    def _runs_plain(self) -> bool:
        if self.merged and not self.adapter_enabled:
            raise InvalidArgumentError(
                "the adapter is merged into weight and cannot be disabled; "
                "call lora_kernels.unmerge(model) first"
            )
        return self.merged or not self.adapter_enabled

    @torch.no_grad()
    def merged_weights(self, sign: float = 1.0) -> dict[str, Tensor]:
        """Name of a weight -> weight + sign * update, summed in fp32 and rounded once."""
        found = {}
        for name, update in self.updates().items():
            weight = getattr(self, name)
            wide = torch.promote_types(weight.dtype, update.dtype)
            found[name] = (weight.to(wide) + sign * update.to(wide)).to(weight.dtype)
        return found

    @torch.no_grad()
    def merge(self, exact: bool = False) -> None:
        """Put the update into the weights; `exact` keeps copies for :meth:`unmerge`.

        Raises:
            InvalidArgumentError: a weight would hold NaN or infinity; nothing changed.
        """
        if self.merged:
            return
        merged = self.merged_weights()
        for name, weight in merged.items():
            if not torch.isfinite(weight).all():
                raise InvalidArgumentError(f"merging would give {name} with NaN or infinity")
        state = {}
        for name, weight in merged.items():
            target = getattr(self, name)
            if exact:
                state[_ORIGINAL + name] = target.detach().to("cpu", copy=True)
            target.copy_(weight)
        self._unmerge_state, self.merged = state, True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the update out again: the kept copies, or a subtraction where there are none."""
        if not self.merged:
            return
        for name, weight in self.merged_weights(sign=-1.0).items():
            getattr(self, name).copy_(self._unmerge_state.get(_ORIGINAL + name, weight))
        self._unmerge_state, self.merged = {}, False

    def _adapter_repr(self) -> str:
        state = "".join(f", {name}" for name in ("rslora", "merged") if getattr(self, name))
        dropout = f", adapter_dropout={self.dropout}" if self.dropout else ""
        return f"r={self.r}, alpha={self.alpha}{dropout}{state}"


def check_adapter(r: int, alpha: float, dropout: float, adapter_dtype: torch.dtype | None) -> None:
    check_hyperparameters(r, alpha, dropout)
    check_dtype(adapter_dtype, "adapter_dtype")


def adapter_dtype_for(weight: Tensor, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """fp32 over a bf16 or fp16 weight, else the weight's own."""
    return adapter_dtype or torch.promote_types(weight.dtype, torch.float32)


@torch.no_grad()
def product(b: Tensor, a: Tensor, scaling: float) -> Tensor:
    """scaling * B A of two matrices, in fp32 or fp64."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    # Autocast would do the product in its own dtype; it knows no meta device.
    with nullcontext() if a.is_meta else torch.autocast(a.device.type, enabled=False):
        return scaling * (b.to(dtype) @ a.to(dtype))
