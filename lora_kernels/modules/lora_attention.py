"""A whole attention block with adapters: projections, rotation, attention, output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.handed_shrink import Switch
from lora_kernels.modules.lora_qkv import LoRAQKV
from lora_kernels.modules.projections import check_layers, check_names, make_projection
from lora_kernels.ops import attention


class LoRAAttention(LoRAQKV):
    """``o_proj(attention(q, k, v))`` of the heads that :class:`LoRAQKV` makes.

    Adds the child ``o_proj`` ``[num_heads * head_dim -> hidden_size]`` and, with sinks=True, the
    parameter ``sinks`` ``[num_heads]``; the names are those of transformers, so weights of a
    Llama's or Qwen3's attention load as they are.

    Args:
        hidden_size ... dtype: as in :class:`LoRAQKV`; r, alpha and dropout may name o_proj.
        output_bias: of o_proj; None: bias.
        causal: a query sees the keys up to its own position.
        window: ``(left, right)``, as in :func:`lora_kernels.ops.attention`.
        scale, softcap: of the scores, likewise.
        sinks: a learned logit per head without a value; trainable, starts at zero.
        attention_dropout: of the weights, in training only.

    Raises:
        InvalidArgumentError: an argument that cannot be used.

    Source: Vaswani et al. 2017, arXiv 1706.03762; Hu et al. 2021, arXiv 2106.09685.
    """

    sinks: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        causal: bool = True,
        window: tuple[int, int] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        attention_dropout: float = 0.0,
        output_bias: bool | None = None,
        bias: bool = False,
        r: int | Mapping[str, int] = 16,
        alpha: float | Mapping[str, float] = 32,
        dropout: float | Mapping[str, float] = 0.0,
        rslora: bool = False,
        quant: str | None = None,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        common: dict[str, Any] = {
            "r": r, "alpha": alpha, "dropout": dropout, "rslora": rslora, "quant": quant,
            "adapter_dtype": adapter_dtype, "device": device, "dtype": dtype,
        }  # fmt: skip
        super().__init__(
            hidden_size, num_heads, num_kv_heads, head_dim, bias=bias, **common, **others
        )
        self.o_proj = make_projection(
            "o_proj", self.num_heads * self.head_dim, hidden_size,
            bias=bias if output_bias is None else output_bias, **common,
        )  # fmt: skip
        made = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype)) if sinks else None
        self._set_attention(causal, window, scale, softcap, attention_dropout, made)

    def _check_names(self, names: tuple[str, ...], **mappings: object) -> None:
        check_names((*names, "o_proj"), **mappings)

    @classmethod
    def from_layers(
        cls,
        *layers: nn.Module,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        interleaved: bool = False,
        input_norm: nn.Module | None = None,
        fused_shrink: Switch = "auto",
        causal: bool = True,
        window: tuple[int, int] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: nn.Parameter | None = None,
        attention_dropout: float = 0.0,
    ) -> LoRAAttention:
        """Of existing layers - q, k, v, o or qkv, o - which are shared, not copied.

        Raises:
            InvalidArgumentError: layers whose sizes do not fit, or of another class.
        """
        if len(layers) not in (2, 4):
            raise InvalidArgumentError(
                f"{len(layers)} layers were given; accepted: four (q, k, v, o) or two (qkv, o)"
            )
        *projections, output = layers
        made = super().from_layers(
            *projections, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
            q_norm=q_norm, k_norm=k_norm, interleaved=interleaved, input_norm=input_norm,
            fused_shrink=fused_shrink,
        )  # fmt: skip
        check_layers({"o_proj": output}, made.num_heads * made.head_dim)
        made.o_proj = output
        made._set_attention(causal, window, scale, softcap, attention_dropout, sinks)
        return made

    def _set_attention(
        self, causal: bool, window: tuple[int, int] | None, scale: float | None,
        softcap: float | None, attention_dropout: float, sinks: nn.Parameter | None,
    ) -> None:  # fmt: skip
        if not 0.0 <= attention_dropout <= 1.0:
            raise InvalidArgumentError(
                f"attention_dropout={attention_dropout!r} is not a probability; accepted: 0 to 1"
            )
        self.causal, self.window, self.scale, self.softcap = bool(causal), window, scale, softcap
        self.attention_dropout = float(attention_dropout)
        self.register_parameter("sinks", sinks)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past: tuple[Tensor, Tensor] | None = None,
        return_kv: bool = False,
    ) -> Any:
        """x ``[B, S, hidden_size]`` to the same shape; packed ``[T, hidden_size]`` with cu_seqlens.

        Args:
            cos, sin, position_ids: of the positions of x, as in :func:`lora_kernels.ops.rope`;
                None: no rotation.
            attn_mask, cu_seqlens: as in :func:`lora_kernels.ops.attention`.
            past: keys and values of earlier positions, ``[B, P, num_kv_heads, head_dim]``, as
                return_kv gave them. x then stands after them.
            return_kv: also return the keys and values of all positions so far.

        Raises:
            InvalidArgumentError: shapes or dtypes that do not fit.
        """
        q, k, v = self.heads(x, cos, sin, position_ids)
        if past is not None:
            if cu_seqlens is not None:
                raise InvalidArgumentError("past cannot be used with cu_seqlens; give one of them")
            k, v = (torch.cat([old, new], -3) for old, new in zip(past, (k, v), strict=True))
        y = attention(
            q, k, v, causal=self.causal, scale=self.scale, window=self.window,
            softcap=self.softcap, sinks=self.sinks, attn_mask=attn_mask, cu_seqlens=cu_seqlens,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )  # fmt: skip
        assert isinstance(y, Tensor)
        y = self.o_proj(y.flatten(-2))
        return (y, (k, v)) if return_kv else y
