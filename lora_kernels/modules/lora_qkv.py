"""The projections of an attention block with adapters: one call, norms of heads, rotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.grouped_linear import has_hooks
from lora_kernels.modules.grouped_lora_linear import GroupedLoRALinear, operands
from lora_kernels.modules.handed_shrink import Switch, check_switch
from lora_kernels.modules.input_norm import make_input_norm, normalized
from lora_kernels.modules.layer_group import Operands, agree
from lora_kernels.modules.lora_linear import LoRALinear
from lora_kernels.modules.projections import check_layers, check_names, make_projection, project
from lora_kernels.ops import lora_qkv, rope

_SEPARATE, _JOINT = ("q_proj", "k_proj", "v_proj"), ("qkv_proj",)


class LoRAQKV(nn.Module):
    """Queries, keys and values of x, in heads, normalised and rotated where asked for.

    The children are named as in transformers: ``q_proj``, ``k_proj``, ``v_proj``, or with
    fused_qkv=True one ``qkv_proj`` whose outputs are all queries, then keys, then values (Phi-3);
    each a :class:`LoRALinear`, or frozen without an adapter, or quantized. Where three layers are
    adapted, x is read once for all of them; each drops its own elements of x. Without norms and
    with every layer adapted the rotation is part of that call (:func:`lora_kernels.ops.lora_qkv`).
    With qk_norm there are also ``q_norm`` and ``k_norm``, with input_norm=True ``input_norm``.

    Args:
        hidden_size: width of x.
        num_heads: of queries.
        num_kv_heads: of keys and values, a divisor of num_heads; None: num_heads.
        head_dim: None: hidden_size / num_heads.
        fused_qkv: one layer in place of three.
        bias: of the projections.
        qk_norm: an RMS norm over each head of q and k, with a weight (Qwen3, Gemma 3).
        norm_eps: of the norms.
        input_norm: an RMS norm of x in front of the projections.
        fused_shrink: whether that norm makes ``S = x A^T`` of the projections while it has x:
            True, False, or ``"auto"``: on a GPU where that was measured to be quicker.
        interleaved: the layout of the rotation, as in :func:`lora_kernels.ops.rope`.
        r, alpha, dropout, rslora, quant, adapter_dtype, device, dtype: as in :class:`LoRAMLP`.

    Raises:
        InvalidArgumentError: an argument that cannot be used.

    Source: Hu et al. 2021, arXiv 2106.09685; Su et al. 2021, arXiv 2104.09864.
    """

    q_norm: nn.Module | None
    k_norm: nn.Module | None
    input_norm: nn.Module | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        fused_qkv: bool = False,
        bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        interleaved: bool = False,
        input_norm: bool = False,
        fused_shrink: Switch = "auto",
        r: int | Mapping[str, int] = 16,
        alpha: float | Mapping[str, float] = 32,
        dropout: float | Mapping[str, float] = 0.0,
        rslora: bool = False,
        quant: str | None = None,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set_heads(hidden_size, num_heads, num_kv_heads, head_dim, interleaved)
        names = _JOINT if fused_qkv else _SEPARATE
        self._check_names(names, r=r, alpha=alpha, dropout=dropout)
        for name, width in zip(names, self._widths(fused_qkv), strict=True):
            layer = make_projection(
                name, hidden_size, width, bias=bias, r=r, alpha=alpha, dropout=dropout,
                rslora=rslora, quant=quant, adapter_dtype=adapter_dtype, device=device, dtype=dtype,
            )  # fmt: skip
            self.add_module(name, layer)
        for name in ("q_norm", "k_norm"):
            norm = nn.RMSNorm(self.head_dim, norm_eps, device=device, dtype=dtype)
            self.register_module(name, norm.requires_grad_(False) if qk_norm else None)
        norm_in_front = make_input_norm(input_norm, hidden_size, norm_eps, device, dtype)
        self._set_input_norm(norm_in_front, fused_shrink)

    def _set_input_norm(self, norm: nn.Module | None, fused_shrink: Switch) -> None:
        check_switch(fused_shrink)
        self.fused_shrink = fused_shrink
        self.register_module("input_norm", norm)

    def _check_names(self, names: tuple[str, ...], **mappings: object) -> None:
        check_names(names, **mappings)

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
    ) -> Any:
        """Of existing layers, three or one, adapted or not, which are shared, not copied.

        head_dim None: that of q_proj, or hidden_size / num_heads of one joint layer. q_norm and
        k_norm are called with ``[..., heads, head_dim]``, input_norm with x; it makes S as well if
        it is a torch.nn.RMSNorm.

        Raises:
            InvalidArgumentError: layers whose sizes do not fit, or of another class.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._adopt(layers, num_heads, num_kv_heads, head_dim, interleaved)
        made.register_module("q_norm", q_norm)
        made.register_module("k_norm", k_norm)
        made._set_input_norm(input_norm, fused_shrink)
        return made.train(layers[0].training)

    def _adopt(
        self, layers: tuple[Any, ...], num_heads: int, num_kv_heads: int | None,
        head_dim: int | None, interleaved: bool,
    ) -> None:  # fmt: skip
        if len(layers) not in (1, 3):
            raise InvalidArgumentError(
                f"{len(layers)} layers were given; accepted: three (q, k, v) or one (qkv)"
            )
        names = _JOINT if len(layers) == 1 else _SEPARATE
        hidden = check_layers(dict(zip(names, layers, strict=True)))
        if head_dim is None and len(layers) == 3 and num_heads:
            head_dim = layers[0].out_features // num_heads
        self._set_heads(hidden, num_heads, num_kv_heads, head_dim, interleaved)
        widths = self._widths(len(layers) == 1)
        for name, layer, width in zip(names, layers, widths, strict=True):
            if layer.out_features != width:
                raise InvalidArgumentError(
                    f"{name} has out_features={layer.out_features}; accepted: {width} for "
                    f"{self.num_heads} and {self.num_kv_heads} heads of {self.head_dim}"
                )
            self.add_module(name, layer)

    def _set_heads(
        self, hidden: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None,
        interleaved: bool,
    ) -> None:  # fmt: skip
        kv = num_heads if num_kv_heads is None else num_kv_heads
        for name, n in (("num_heads", num_heads), ("num_kv_heads", kv)):
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                raise InvalidArgumentError(f"{name}={n!r} is not usable; accepted: an integer >= 1")
        if num_heads % kv:
            raise InvalidArgumentError(
                f"num_kv_heads={kv} does not divide num_heads={num_heads}; accepted: a divisor"
            )
        if head_dim is None and hidden % num_heads:
            raise InvalidArgumentError(
                f"hidden_size={hidden} is no multiple of num_heads={num_heads}; give head_dim"
            )
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden, num_heads, kv
        self.head_dim = hidden // num_heads if head_dim is None else head_dim
        self.interleaved = bool(interleaved)

    def _widths(self, joint: bool) -> tuple[int, ...]:
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return (q + 2 * kv,) if joint else (q, kv, kv)

    def heads(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x ``[B, S, hidden_size]`` (packed ``[T, hidden_size]``) to q ``[B, S, num_heads,
        head_dim]``, k and v ``[B, S, num_kv_heads, head_dim]`` (packed ``[T, ...]``).

        cos, sin, position_ids: as in :func:`lora_kernels.ops.rope`; None: no rotation.

        Raises:
            InvalidArgumentError: shapes or dtypes that do not fit.
        """
        layers: Any = self._modules
        joint = "qkv_proj" in layers
        members, given = [layers[name] for name in (_JOINT if joint else _SEPARATE)], None
        if self.input_norm is not None:
            x, given = normalized(self.input_norm, x, members, self.fused_shrink)
        made = self._rotated_projections(x, cos, sin, position_ids) if given is None else None
        if made is not None:
            return made
        parts: Any = project(members, x, given)
        if joint:
            parts = parts[0].split(self._widths(False), -1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in parts)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if cos is not None and sin is not None:
            rotated, turned = rope(
                q, k, cos, sin, interleaved=self.interleaved, position_ids=position_ids
            )
            assert turned is not None
            q, k = rotated, turned
        elif cos is not None or sin is not None or position_ids is not None:
            raise InvalidArgumentError("cos and sin are needed for a rotation; give both or none")
        return q, k, v

    def _rotated_projections(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """:meth:`heads` as one call of the op; None where a norm stands between, or a projection
        has to be called by itself. torch.compile traces the parts: a changed scaling then compiles
        nothing anew."""
        if cos is None or sin is None or self.q_norm is not None or self.k_norm is not None:
            return None
        if torch.compiler.is_compiling() or x.dim() not in (2, 3):
            return None
        H, Hk = self.num_heads, self.num_kv_heads
        joint = "qkv_proj" in self._modules
        found: list[Operands] = []
        for name in _JOINT if joint else _SEPARATE:
            layer: Any = self._modules[name]
            if type(layer) not in (LoRALinear, GroupedLoRALinear) or "forward" in layer.__dict__:
                return None
            one = None if has_hooks(layer) else operands(layer, x)
            if not isinstance(one, Operands) or (found and not agree(found[0], one)):
                return None
            found.append(one)
        weights, lora_as, lora_bs, scalings, biases, rates = zip(*found, strict=True)
        heads = lora_qkv(
            x, weights, lora_as, lora_bs, scalings, cos, sin, head_dim=self.head_dim,
            rotated=(H + Hk,) if joint else (H, Hk, 0), biases=biases,
            interleaved=self.interleaved, position_ids=position_ids, dropout_p=rates[0],
        )  # fmt: skip
        q, k, v = heads[0].split((H, Hk, Hk), -2) if joint else heads
        return q, k, v

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`heads`."""
        return self.heads(x, cos, sin, position_ids)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
