"""A low-rank adapter over a quantized, frozen weight (QLoRA), computed by the fused op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.eligibility import check_dtype, check_hyperparameters
from lora_kernels.modules.lora_linear import LoRALinear
from lora_kernels.modules.quant_linear import QuantLinear
from lora_kernels.ops.quant_linear import QuantTensor, quant_linear, quant_lora_linear


class QuantLoRALinear(QuantLinear, LoRALinear):
    """``y = x W^T + bias + scaling * dropout(x) A^T B^T`` with W quantized.

    :class:`QuantLinear` with the adapter of :class:`LoRALinear`: the same parameters lora_A and
    lora_B, attributes, adapter files and switches. `merge` replaces such a layer, see there.

    Args:
        in_features, out_features, bias, format, block_size, double_quant, quant_storage,
        compute_dtype, device, dtype: as in :class:`QuantLinear`.
        r, alpha, dropout, rslora, adapter_dtype: as in :class:`LoRALinear`.

    Raises:
        InvalidArgumentError: an argument that cannot be used; on the forward, input that does not
            fit.

    Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        bias: bool = True,
        rslora: bool = False,
        format: str = "nf4",
        block_size: int | None = None,
        double_quant: bool | None = None,
        quant_storage: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_hyperparameters(r, alpha, dropout)
        check_dtype(adapter_dtype, "adapter_dtype")
        QuantLinear.__init__(
            self, in_features, out_features, bias, format, block_size, double_quant,
            quant_storage, compute_dtype, device, dtype,
        )  # fmt: skip
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self._add_adapter(r, alpha, dropout, rslora, adapter_dtype)

    @classmethod
    def from_quant_linear(
        cls,
        linear: QuantLinear,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> QuantLoRALinear:
        """An adapter over the very packed data and bias of `linear`, which are frozen."""
        layer = cls.from_quantized(linear.quant_weight, linear.bias, linear.compute_dtype)
        assert isinstance(layer, QuantLoRALinear)
        layer.add_adapter(r, alpha, dropout, rslora, adapter_dtype)
        return layer.train(linear.training)

    def add_adapter(
        self,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """A new adapter, after :meth:`from_quantized`, which leaves the layer without one."""
        check_hyperparameters(r, alpha, dropout)
        check_dtype(adapter_dtype, "adapter_dtype")
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self._add_adapter(r, alpha, dropout, rslora, adapter_dtype)

    def _add_adapter(
        self, r: int, alpha: float, dropout: float, rslora: bool, dtype: torch.dtype | None
    ) -> None:
        self.r, self.alpha, self.dropout = r, alpha, float(dropout)
        self.rslora, self.dora = bool(rslora), False
        self.merged = False
        self.adapter_enabled = True
        self._unmerge_state: dict[str, Tensor] = {}
        self._create_adapter(dtype)

    def _create_adapter(self, dtype: torch.dtype | None) -> None:
        if dtype is None:
            dtype = torch.promote_types(self.spec.dtype, torch.float32)
        n, k, device = self.out_features, self.in_features, self.weight.device
        self.lora_A = nn.Parameter(torch.empty(self.r, k, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(n, self.r, dtype=dtype, device=device))
        self.register_parameter("lora_magnitude_vector", None)
        self.reset_adapter()

    def reset_parameters(self) -> None:
        self.reset_adapter()

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.compute_dtype is None else input.to(self.compute_dtype)
        q: QuantTensor = self.quant_weight
        if not self.adapter_enabled:
            y = quant_linear(x, q, self.bias)
        else:
            y = quant_lora_linear(
                x, q, self.lora_A, self.lora_B, self.scaling, bias=self.bias,
                dropout_p=self.dropout if self.training else 0.0,
            )  # fmt: skip
        return y if self.compute_dtype is None else y.to(input.dtype)

    def extra_repr(self) -> str:
        text = f"{QuantLinear.extra_repr(self)}, r={self.r}, alpha={self.alpha}"
        return text + f", dropout={self.dropout}" + (", rslora" if self.rslora else "")

    @classmethod
    def from_linear(cls, linear: nn.Linear, *args: object, **kwargs: object) -> QuantLoRALinear:
        """Not offered: see :meth:`from_quant_linear` and :func:`lora_kernels.replace_modules`."""
        raise InvalidArgumentError(
            "quantize first: QuantLoRALinear.from_quant_linear(QuantLinear.from_linear(linear), r=)"
        )
