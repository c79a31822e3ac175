"""nn.Linear with a low-rank adapter, computed by the fused op."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules import dora as dora_composition
from lora_kernels.modules.adapted_layer import AdaptedLayer
from lora_kernels.modules.eligibility import check_dtype, check_hyperparameters, obstacle
from lora_kernels.ops import lora_linear


class LoRALinear(nn.Linear):
    """``y = x W^T + bias + scaling * dropout(x) A^T B^T`` with W and bias frozen.

    A drop-in for :class:`torch.nn.Linear`: `weight` and `bias` keep their state-dict keys. The
    adapter adds the parameters

        lora_A                  [r, in_features]      Kaiming uniform (a = sqrt(5))
        lora_B                  [out_features, r]     zeros, so a new adapter changes nothing
        lora_magnitude_vector   [out_features]        dora=True only: the row norms of W

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        r: rank, any integer >= 1.
        alpha: numerator of the scaling, a finite number > 0. The attribute may be changed at any
            time; `scaling` is computed when it is read.
        dropout: probability of dropping an input element on the adapter's path, in training only.
        rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732), not alpha / r.
        dora: weight-decomposed adapter (Liu et al. 2024, arXiv 2402.09353): the rows of
            W + scaling B A are normalised, the norm taken as a constant, and scaled by
            lora_magnitude_vector. After loading other weights into W of a layer whose adapter is
            still untrained, call :meth:`reset_adapter` to take the norms again.
        adapter_dtype: dtype of the adapter. None gives float32 over a bf16 or fp16 W, so that the
            optimizer works in fp32, and otherwise the dtype of W.

    Attributes:
        merged: the adapter is folded into W (see :func:`lora_kernels.merge`); the forward is then
            the plain linear, in training too.
        adapter_enabled: False gives the plain linear; see also :func:`adapters_disabled`.

    Shapes: x ``[..., in_features]`` to y ``[..., out_features]``, in the dtype of W or, under
    autocast, in the autocast dtype.

    Raises:
        InvalidArgumentError: r, alpha, dropout or a dtype that cannot be used; on the forward,
            input that does not fit, or an adapter that is merged and disabled at once.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude_vector: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        bias: bool = True,
        rslora: bool = False,
        dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_hyperparameters(r, alpha, dropout)
        check_dtype(adapter_dtype, "adapter_dtype")
        check_dtype(dtype, "dtype")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.r, self.alpha, self.dropout = r, alpha, float(dropout)
        self.rslora, self.dora = bool(rslora), bool(dora)
        self.merged = False
        self.adapter_enabled = True
        self._unmerge_state: dict[str, Tensor] = {}
        self.requires_grad_(False)
        self._create_adapter(adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """A LoRA layer on the very weight and bias of `linear`, which are frozen, not copied.

        Raises:
            InvalidArgumentError: `linear` is not exactly torch.nn.Linear with a plain floating
                weight, has hooks that the new layer would not run, or an argument is out of range.
        """
        reason = obstacle(linear)
        if reason:
            raise InvalidArgumentError(f"linear cannot become a LoRALinear: {reason}")
        weight = linear.weight
        layer = cls(
            weight.shape[1], weight.shape[0], r, alpha, dropout, linear.bias is not None, rslora,
            dora, adapter_dtype, device="meta", dtype=weight.dtype,
        )  # fmt: skip
        layer.weight, layer.bias = weight, linear.bias
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        layer._create_adapter(adapter_dtype)
        return layer.train(linear.training)

    def _create_adapter(self, dtype: torch.dtype | None) -> None:
        weight = self.weight
        if dtype is None:
            dtype = torch.promote_types(weight.dtype, torch.float32)
        n, k = weight.shape
        self.lora_A = nn.Parameter(weight.new_empty(self.r, k, dtype=dtype))
        self.lora_B = nn.Parameter(weight.new_empty(n, self.r, dtype=dtype))
        if self.dora:
            self.lora_magnitude_vector = nn.Parameter(weight.new_empty(n, dtype=dtype))
        else:
            self.register_parameter("lora_magnitude_vector", None)
        self.reset_adapter()

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Start the adapter anew: A random, B zero, the magnitude that leaves W as it is."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(dora_composition.weight_norm(self))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "lora_A" in self._parameters:  # not yet while nn.Linear is being built
            self.reset_adapter()

    def forward(self, input: Tensor) -> Tensor:
        if self.merged:
            if not self.adapter_enabled:
                raise InvalidArgumentError(
                    "the adapter is merged into weight and cannot be disabled; "
                    "call lora_kernels.unmerge(model) first"
                )
            return F.linear(input, self.weight, self.bias)
        if not self.adapter_enabled:
            return F.linear(input, self.weight, self.bias)
        if self.lora_magnitude_vector is not None:
            return dora_composition.forward(self, input)
        return lora_linear(
            input,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.scaling,
            bias=self.bias,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        state = "".join(f", {name}" for name in ("rslora", "dora", "merged") if getattr(self, name))
        return (
            f"{super().extra_repr()}, r={self.r}, alpha={self.alpha}, dropout={self.dropout}{state}"
        )


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, every adapted layer of `model` is the plain one; on leaving, as it was before.

    Raises:
        InvalidArgumentError: a layer is merged; its weight no longer is the plain one.
    """
    layers = [m for m in model.modules() if isinstance(m, (LoRALinear, AdaptedLayer))]
    if any(layer.merged for layer in layers):
        raise InvalidArgumentError(
            "a merged adapter cannot be disabled; call lora_kernels.unmerge(model) first"
        )
    before = [layer.adapter_enabled for layer in layers]
    try:
        for layer in layers:
            layer.adapter_enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.adapter_enabled = enabled
