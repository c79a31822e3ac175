"""``attn_implementation="lora_kernels"``: transformers models on the attention op.

transformers asks two registries, one for the attention and one for the mask that belongs to it. A
name that only the first knows gets no mask at all, and padding is silently attended to; so both are
registered, the mask being that of ``sdpa``: boolean, or None where it would say no more than
``is_causal``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops import attention, attention_decode

NAME = "lora_kernels"

# What transformers hands from the model's call down to every attention, without a meaning for it.
# position_ids: rotary tables and the mask are made of them before.
_NO_MEANING = frozenset({
    "position_ids", "cache_position", "use_cache", "return_dict", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "max_length_q", "max_length_k",
    "position_embeddings", "logits_to_keep",
})  # fmt: skip


def register_attention() -> str:
    """Make transformers know ``attn_implementation="lora_kernels"``; again does nothing.

    For ``from_pretrained(..., attn_implementation="lora_kernels")`` and
    ``model.set_attn_implementation("lora_kernels")``.

    Returns:
        The name, ``"lora_kernels"``.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)
    return NAME


def make_mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """``sdpa_mask``; additive, and never None, for models that would misread a boolean one or none.

    They are those that claim to work with neither ``sdpa`` nor other implementations: some of their
    layers add the mask to the scores by themselves, or are causal by the mask alone.
    """
    if config is None or _takes_any_mask(config.__class__):
        return sdpa_mask(*args, config=config, **kwargs)
    kwargs["allow_is_bidirectional_skip"] = False
    return eager_mask(*args, config=config, **kwargs)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _takes_any_mask(config: Any) -> bool:
    """Does a model of this class of configuration claim so; True where there is no such model."""
    if config not in _takes:
        _takes[config] = _claims(config)
    return _takes[config]


_takes: dict[Any, bool] = {}


def _claims(config: Any) -> bool:
    models = [m for m in _subclasses(PreTrainedModel) if getattr(m, "config_class", None) is config]
    claims = ("_supports_sdpa", "_supports_attention_backend")
    return not models or any(getattr(m, claim, False) for m in models for claim in claims)


def _subclasses(cls: Any) -> set[Any]:
    direct = set(cls.__subclasses__())
    return direct.union(*map(_subclasses, direct))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    indices: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One attention of a model, as transformers calls it.

    Args:
        query, key, value: ``[B, H, S, D]``; key and value keep their own number of heads.
        attention_mask: of ``sdpa_mask``, bool, or additive; None: causal if the module is.
        sliding_window: counted in the mask already; where there is none, it reaches over all keys.
        softcap, s_aux: of the scores; sinks ``[H]``.
        position_bias: added to the scores, ``[1 or B, H, S, Sk]``; may require a gradient.
        cu_seq_lens_q, cu_seq_lens_k: where the sequences of a packed batch of one begin.
        indices: the keys that a query may see at all, ``[B, S, n]`` (sparse attention).

    Returns:
        ``[B, S, H, D]`` contiguous, and None: weights are never made.

    Raises:
        InvalidArgumentError: an argument that would change the result and is not honoured.
    """
    _refuse(others)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    length = query.shape[2]
    causal = bool(is_causal) and attention_mask is None and length > 1
    if indices is not None:
        attention_mask = _chosen(attention_mask, indices, key.shape[2])
    if causal and key.shape[2] > length and cu_seq_lens_q is None:
        # The empty end of a static cache: keys at the first positions are the ones there are.
        key, value = key[:, :, :length], value[:, :, :length]
        if position_bias is not None:
            position_bias = position_bias[..., :length]
        if attention_mask is not None:
            attention_mask = attention_mask[..., :length]
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if length == 1 and not (dropout or cu_seq_lens_q is not None or position_bias is not None):
        step = _decode(q, k, v, attention_mask, scaling, softcap, s_aux)
        if step is not None:
            return step, None
    window = None
    if causal and sliding_window is not None and sliding_window < length:
        window = (sliding_window - 1, 0)
    options: dict[str, Any] = {
        "causal": causal, "scale": scaling, "window": window, "softcap": softcap, "sinks": s_aux,
        "dropout_p": dropout,
    }  # fmt: skip
    if cu_seq_lens_q is not None:
        packed = _packed(q, cu_seq_lens_q, cu_seq_lens_k)
        if attention_mask is None and position_bias is None:
            out = attention(
                q[0], k[0], v[0], cu_seqlens=packed[0], cu_seqlens_k=packed[1], **options
            )
            assert isinstance(out, Tensor)
            return out.unsqueeze(0), None
        attention_mask = _with_segments(attention_mask, packed, length, k.shape[1])
    mask = _with_bias(attention_mask, position_bias)
    out = attention(q, k, v, attn_mask=mask, **options)
    assert isinstance(out, Tensor)
    return out, None


def _decode(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """A generation step on the CPU, whose one query sees every key; None where it is none. The
    kernels of a cache sum in another order than those that a gradient runs through."""
    if mask is not None or q.device.type != "cpu":
        return None
    if any(t is not None and t.requires_grad for t in (q, k, v, sinks)):
        return None
    lengths = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
    out = attention_decode(q, k, v, lengths, scale=scaling, softcap=softcap, sinks=sinks)
    assert isinstance(out, Tensor)
    return out


def _refuse(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name in _NO_MEANING or value is None or value is False:
            continue
        hint = '; use attn_implementation="eager"' if name == "output_attentions" else ""
        raise InvalidArgumentError(
            f'attn_implementation="{NAME}" does not honour {name}={_short(value)}{hint}'
        )


def _short(value: Any) -> str:
    return f"<{type(value).__name__}>" if hasattr(value, "shape") else repr(value)[:60]


def _packed(q: Tensor, cu_q: Tensor, cu_k: Tensor | None) -> tuple[Tensor, Tensor]:
    if q.shape[0] != 1:
        raise InvalidArgumentError(
            f"cu_seq_lens_q was given with a batch of {q.shape[0]}; accepted: packed into one row"
        )
    return cu_q, cu_q if cu_k is None else cu_k


def _chosen(mask: Tensor | None, indices: Tensor, keys: int) -> Tensor:
    """`mask` without the keys that `indices` does not name."""
    named = torch.zeros(*indices.shape[:2], keys, dtype=torch.bool, device=indices.device)
    named = named.scatter_(-1, indices.long(), True).unsqueeze(1)
    return _and(mask, named)


def _and(mask: Tensor | None, seen: Tensor) -> Tensor:
    if mask is None or mask.dtype == torch.bool:
        return seen if mask is None else mask & seen
    return mask.masked_fill(~seen, float("-inf"))


def _with_segments(
    mask: Tensor | None, packed: tuple[Tensor, Tensor], queries: int, keys: int
) -> Tensor:
    """`mask` without what lies in another sequence."""
    at = [
        torch.bucketize(torch.arange(n, device=cu.device), cu[1:].long(), right=True)
        for cu, n in zip(packed, (queries, keys), strict=True)
    ]
    same = (at[0].unsqueeze(1) == at[1].unsqueeze(0))[None, None]
    return _and(mask, same)


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if bias is None or mask is None:
        return mask if bias is None else bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, float("-inf"))
    return bias + mask
