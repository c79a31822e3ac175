"""nn.LSTM with low-rank adapters on its input-hidden and hidden-hidden weights."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.adapted_layer import (
    AdaptedLayer,
    adapter_dtype_for,
    check_adapter,
    product,
)

KINDS = ("ih", "hh")
# Weights of the forwards that run, per thread: id of the layer -> list.
_FORWARDS = threading.local()


class LoRALSTM(AdaptedLayer, nn.LSTM):
    """An LSTM whose weights are ``W + scaling * B A``, with W and the biases frozen.

    A drop-in for :class:`torch.nn.LSTM` in all of its forms: several layers, both directions,
    projections, batch_first, packed sequences. Each adapted ``weight_ih_l0`` (``_hh_``, ``_l1``,
    ``_reverse``, ...) has the parameters

        lora_A_ih_l0    [r, columns of the weight]    Kaiming uniform (a = sqrt(5))
        lora_B_ih_l0    [4 * hidden_size, r]          zeros, so a new adapter changes nothing

    The weight with its update is written out once per call, 4 hidden_size (input + hidden) numbers,
    and serves all steps of the sequence in torch's own LSTM kernels; A and B get their gradients
    from the gradient of that weight. The projection weight_hr has no adapter.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype: as in torch.nn.LSTM; `dropout` is the one between the layers.
        r, alpha, rslora, adapter_dtype: as in :class:`lora_kernels.LoRALinear`. There is no dropout
            on the adapter's path: all steps share one weight.
        adapt: which weights get an adapter, ``"ih"``, ``"hh"`` or both.

    Raises:
        InvalidArgumentError: an argument that cannot be used.

    Source: Hu et al. 2021, arXiv 2106.09685, applied to the weights of torch.nn.LSTM.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        r: int = 16,
        alpha: float = 32,
        rslora: bool = False,
        adapt: Sequence[str] = KINDS,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_adapter(r, alpha, 0.0, adapter_dtype)
        nn.LSTM.__init__(
            self, input_size, hidden_size, num_layers, bias=bias, batch_first=batch_first,
            dropout=dropout, bidirectional=bidirectional, proj_size=proj_size, device=device,
            dtype=dtype,
        )  # fmt: skip
        self._create_adapter(r, alpha, rslora, adapt, adapter_dtype)

    @classmethod
    def from_lstm(
        cls,
        lstm: nn.LSTM,
        r: int = 16,
        alpha: float = 32,
        rslora: bool = False,
        adapt: Sequence[str] = KINDS,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRALSTM:
        """On the very weights and biases of `lstm`, which are frozen, not copied.

        Raises:
            InvalidArgumentError: `lstm` is not exactly torch.nn.LSTM, or an argument is out of
                range.
        """
        reason = lstm_obstacle(lstm)
        if reason:
            raise InvalidArgumentError(f"lstm cannot become a LoRALSTM: {reason}")
        check_adapter(r, alpha, 0.0, adapter_dtype)
        layer = cls.__new__(cls)
        nn.LSTM.__init__(
            layer, lstm.input_size, lstm.hidden_size, lstm.num_layers, bias=lstm.bias,
            batch_first=lstm.batch_first, dropout=lstm.dropout, bidirectional=lstm.bidirectional,
            proj_size=lstm.proj_size, device="meta", dtype=lstm.weight_ih_l0.dtype,
        )  # fmt: skip
        for name, parameter in lstm.named_parameters():
            setattr(layer, name, parameter)
        layer._create_adapter(r, alpha, rslora, adapt, adapter_dtype)
        return layer.train(lstm.training)

    def _create_adapter(
        self,
        r: int,
        alpha: float,
        rslora: bool,
        adapt: Sequence[str],
        adapter_dtype: torch.dtype | None,
    ) -> None:
        kinds = (adapt,) if isinstance(adapt, str) else tuple(adapt)
        if not kinds or not set(kinds) <= set(KINDS):
            raise InvalidArgumentError(f"adapt={adapt!r}; accepted: 'ih', 'hh' or both")
        between = self._lstm_dropout()
        self._begin_adapter(r, alpha, 0.0, rslora)
        self.dropout = between  # nn.LSTM's own, between its layers
        self.adapt = tuple(k for k in KINDS if k in kinds)
        for name in self.adapted_names():
            weight = getattr(self, name)
            rows, columns = weight.shape
            dtype = adapter_dtype_for(weight, adapter_dtype)
            short = name.removeprefix("weight_")
            a, b = weight.new_empty(r, columns, dtype=dtype), weight.new_empty(rows, r, dtype=dtype)
            self.register_parameter(f"lora_A_{short}", nn.Parameter(a))
            self.register_parameter(f"lora_B_{short}", nn.Parameter(b))
        self.reset_adapter()

    def _lstm_dropout(self) -> float:
        return float(self.__dict__["dropout"])

    def adapted_names(self) -> list[str]:
        """The weights that have an adapter, in the order of nn.LSTM."""
        prefixes = tuple(f"weight_{kind}_" for kind in self.adapt)
        return [name for group in self._all_weights for name in group if name.startswith(prefixes)]

    def _pair(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        short = name.removeprefix("weight_")
        return getattr(self, f"lora_A_{short}"), getattr(self, f"lora_B_{short}")

    @torch.no_grad()
    def reset_adapter(self) -> None:
        for name in self.adapted_names():
            a, b = self._pair(name)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(b)

    def factors(self) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for name in self.adapted_names():
            a, b = self._pair(name)
            short = name.removeprefix("weight_")
            found |= {f"lora_A.{short}.weight": a, f"lora_B.{short}.weight": b}
        return found

    def updates(self) -> dict[str, Tensor]:
        found = {}
        for name in self.adapted_names():
            a, b = self._pair(name)
            found[name] = product(b, a, self.scaling)
        return found

    def effective_weight(self, name: str) -> Tensor:
        """``W + scaling * B A`` of one weight, with gradients for A and B, in the dtype of W."""
        weight = getattr(self, name)
        a, b = self._pair(name)
        wide = torch.promote_types(weight.dtype, a.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            whole = torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=self.scaling)
        return whole.to(weight.dtype)

    @property
    def _flat_weights(self) -> list[Any]:
        """What torch hands to its kernels: inside a forward the weights with their updates."""
        inside = getattr(_FORWARDS, "weights", {}).get(id(self))
        if inside is not None:
            return inside
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any]) -> None:
        """torch keeps a list in step with its parameters; here the list is derived from them."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        if self._runs_plain():
            return nn.LSTM.forward(self, input, hx)
        adapted = set(self.adapted_names())
        weights = [
            self.effective_weight(name) if name in adapted else getattr(self, name, None)
            for name in self._flat_weights_names
        ]
        running = _FORWARDS.__dict__.setdefault("weights", {})
        running[id(self)] = weights
        try:
            return nn.LSTM.forward(self, input, hx)
        finally:
            del running[id(self)]

    def reset_parameters(self) -> None:
        """As nn.LSTM, and the adapter anew."""
        bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0.0
        for name, parameter in self.named_parameters():
            if not name.startswith("lora_"):
                nn.init.uniform_(parameter, -bound, bound)
        if "adapt" in self.__dict__:
            self.reset_adapter()

    def _update_flat_weights(self) -> None:
        """Nothing to refresh, see above."""

    def flatten_parameters(self) -> None:
        """cuDNN's single block of weights would hold W without its update: left out."""

    def extra_repr(self) -> str:
        return f"{nn.LSTM.extra_repr(self)}, {self._adapter_repr()}, adapt={'+'.join(self.adapt)}"

    def _adapter_repr(self) -> str:
        state = "".join(f", {name}" for name in ("rslora", "merged") if getattr(self, name))
        return f"r={self.r}, alpha={self.alpha}{state}"


def lstm_obstacle(lstm: nn.Module) -> str:
    """Why `lstm` cannot carry an adapter; empty when it can."""
    if type(lstm) is not nn.LSTM:
        kind = f"{type(lstm).__module__}.{type(lstm).__qualname__}"
        return f"its type is {kind}; accepted: exactly torch.nn.LSTM"
    return ""
