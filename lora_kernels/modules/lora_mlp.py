"""The MLP of a transformer block with adapters: gate and up together, the activation recomputed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules import grouped_lora_linear
from lora_kernels.modules.grouped_linear import has_hooks
from lora_kernels.modules.grouped_lora_linear import GroupedLoRALinear
from lora_kernels.modules.handed_shrink import Switch, Wanted, backend_for, check_switch, usable
from lora_kernels.modules.input_norm import make_input_norm, normalized
from lora_kernels.modules.layer_group import Operands, compute_together
from lora_kernels.modules.lora_linear import LoRALinear
from lora_kernels.modules.mlp_function import fused_mlp
from lora_kernels.modules.projections import check_layers, check_names, make_projection, project
from lora_kernels.modules.recomputed import recomputed
from lora_kernels.ops import gated_activation

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")
_NAMES = ("gate_proj", "up_proj", "down_proj")


class LoRAMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` without a gate.

    SwiGLU (silu), GEGLU (gelu, gelu_tanh), ReGLU (relu), and with gated=False the two-layer MLP
    with GELU, ReLU or squared ReLU. The children are named as in transformers' Llama:

        gate_proj   [hidden_size -> intermediate_size]     gated only
        up_proj     [hidden_size -> intermediate_size]
        down_proj   [intermediate_size -> hidden_size]

    each a :class:`LoRALinear`, or frozen without an adapter, or quantized; adapters are saved and
    loaded by :func:`lora_kernels.save_adapter` as those of any model. x is read once for gate and
    up. For the backward x, the two S and the outputs of gate and up are kept; the activation is
    computed again, twice, and nothing else of that size exists.

    Args:
        hidden_size, intermediate_size: widths.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu``, ``relu_squared``.
        gated: with gate_proj, or without.
        bias: of the projections.
        r, alpha, dropout: as in LoRALinear, one value for all projections, or a mapping from
            their names. A projection that a mapping of r leaves out, or that has rank 0, has no
            adapter; alpha is twice the rank and dropout 0 where a mapping leaves them out.
        rslora, adapter_dtype, device, dtype: as in LoRALinear.
        quant: format of the frozen weights (``"nf4"``, ...), or None for dense ones.
        recompute: False keeps the activation for the backward of down_proj, which saves one pass
            over gate and up and costs ``intermediate_size`` values per row. Under checkpointing
            and torch.compile it is kept anyway.
        input_norm: an RMS norm of x in front, the child ``input_norm``; norm_eps: of it.
        fused_shrink: whether that norm makes ``S = x A^T`` of gate and up while it has x, and the
            activation S of down: True, False, or ``"auto"``: on a GPU where that was measured to be
            quicker.

    Where every projection has an adapter over a dense weight and no hooks, the whole forward is one
    autograd node; else the layers are called one by one.

    Shapes: x ``[..., hidden_size]`` to ``[..., hidden_size]``.

    Raises:
        InvalidArgumentError: an argument that cannot be used.

    Source: Shazeer 2020, arXiv 2002.05202; Hu et al. 2021, arXiv 2106.09685.
    """

    input_norm: nn.Module | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        *,
        gated: bool = True,
        bias: bool = False,
        r: int | Mapping[str, int] = 16,
        alpha: float | Mapping[str, float] = 32,
        dropout: float | Mapping[str, float] = 0.0,
        rslora: bool = False,
        quant: str | None = None,
        recompute: bool = True,
        input_norm: bool = False,
        norm_eps: float = 1e-6,
        fused_shrink: Switch = "auto",
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        names = _NAMES if gated else _NAMES[1:]
        check_names(names, r=r, alpha=alpha, dropout=dropout)
        layers = {}
        for name in names:
            sizes = (hidden_size, intermediate_size)
            layers[name] = make_projection(
                name, *(sizes[::-1] if name == "down_proj" else sizes), bias=bias, r=r, alpha=alpha,
                dropout=dropout, rslora=rslora, quant=quant, adapter_dtype=adapter_dtype,
                device=device, dtype=dtype,
            )  # fmt: skip
        self._adopt(
            layers.get("gate_proj"), layers["up_proj"], layers["down_proj"], activation, recompute
        )
        norm = make_input_norm(input_norm, hidden_size, norm_eps, device, dtype)
        self._set_input_norm(norm, fused_shrink)

    def _set_input_norm(self, norm: nn.Module | None, fused_shrink: Switch) -> None:
        check_switch(fused_shrink)
        self.fused_shrink = fused_shrink
        self.register_module("input_norm", norm)

    @classmethod
    def from_layers(
        cls,
        gate: nn.Module | None,
        up: nn.Module,
        down: nn.Module,
        activation: str = "silu",
        *,
        recompute: bool = True,
        input_norm: nn.Module | None = None,
        fused_shrink: Switch = "auto",
    ) -> LoRAMLP:
        """Of existing layers, adapted or not, which are shared, not copied; gate None: not gated.
        input_norm is called with x; it makes S as well if it is a torch.nn.RMSNorm.

        Raises:
            InvalidArgumentError: layers whose sizes do not fit, or of another class.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._adopt(gate, up, down, activation, recompute)
        made._set_input_norm(input_norm, fused_shrink)
        return made.train(up.training)

    def _adopt(
        self, gate: nn.Module | None, up: nn.Module, down: nn.Module, activation: str,
        recompute: bool,
    ) -> None:  # fmt: skip
        if activation not in ACTIVATIONS:
            raise InvalidArgumentError(
                f"activation={activation!r} is not usable; accepted: {', '.join(ACTIVATIONS)}"
            )
        first = {"up": up} if gate is None else {"gate": gate, "up": up}
        check_layers(first)
        widths = {name: int(layer.out_features) for name, layer in first.items()}  # type: ignore[arg-type]
        if len(set(widths.values())) > 1:
            raise InvalidArgumentError(f"gate and up differ in out_features: {widths}")
        check_layers({"down": down}, widths["up"])
        if gate is not None:
            self.gate_proj = gate
        self.up_proj, self.down_proj = up, down
        self.gated, self.activation, self.recompute = gate is not None, activation, bool(recompute)

    def forward(self, x: Tensor) -> Tensor:
        first = (self.gate_proj, self.up_proj) if self.gated else (self.up_proj,)
        given, shrink = None, self.fused_shrink
        if self.input_norm is not None:
            x, given = normalized(self.input_norm, x, first, shrink)
        found, down = [_operands(layer, x) for layer in first], _operands(self.down_proj, x)
        shrunk = None if given is None else given.of([o for o in found if o is not None])
        y = fused_mlp(x, found, down, self.activation, self.recompute, shrink, shrunk)
        if y is not None:
            return y
        gate, up = [*project(first, x, given), None][:2]
        assert gate is not None
        return activate_and_project(
            self.down_proj, gate, up, self.activation, self.recompute, shrink, down
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}, gated={self.gated}, recompute={self.recompute}"


def _operands(layer: nn.Module, x: Tensor) -> Operands | None:
    """Of exactly a LoRALinear that nothing watches."""
    exact = type(layer) in (LoRALinear, GroupedLoRALinear) and "forward" not in layer.__dict__
    found = grouped_lora_linear.operands(layer, x) if exact and not has_hooks(layer) else None
    return found if isinstance(found, Operands) else None


def activate_and_project(
    down: nn.Module, gate: Tensor, up: Tensor | None, kind: str, recompute: bool,
    shrink: Switch = False, operands: Operands | None = None,
) -> Tensor:  # fmt: skip
    """``down(act(gate) * up)``; with recompute the argument of down is not kept.

    operands: those of down for a call that may stand for ``down(...)``, with S that the activation
    made as `shrink` has it.
    """
    wanted = None if operands is None else _wanted(gate, operands, shrink)
    s: Tensor | None = None
    if wanted is None:
        h = gated_activation(gate, up, kind)
    else:
        values = [a.detach() for a in wanted.lora_as]
        h, s = gated_activation(gate, up, kind, lora_as=values, backend=wanted.backend)

    def behind() -> Tensor:
        if operands is None or s is None:
            return down(h)
        return compute_together(h, [operands], s)[0]

    if not recompute:
        return behind()
    kept_gate, kept_up = gate.detach(), None if up is None else up.detach()
    kept = [t for t in (kept_gate, kept_up) if t is not None]
    with recomputed(h, lambda: gated_activation(kept_gate, kept_up, kind), *kept):
        return behind()


def _wanted(gate: Tensor, down: Operands, shrink: Switch) -> Wanted | None:
    """What the activation has to make beside H ``[..., intermediate_size]``; None: nothing. Only
    where it is asked for: what is measured is an MLP as one node."""
    if shrink is not True or down.lora_a is None or down.dropout_p > 0.0:
        return None
    if torch.compiler.is_compiling() or not usable(gate, (down.lora_a,)):
        return None
    backend = backend_for(shrink, "activation_shrink", "fwd", gate)
    return Wanted((down.lora_a,), backend) if backend else None
