"""Public function of the op: validation, autocast, one form for every caller."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops import _dispatch
from lora_kernels.ops.attention import autograd, contract, validate


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    attn_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale q k^T + bias) v`` without keeping the scores, with all gradients.

    The last query stands at the last key: causal, window and ALiBi count from there
    ("bottom-right"). ``torch.nn.functional.scaled_dot_product_attention(is_causal=True)`` puts the
    first query at the first key instead; the two agree where there are as many queries as keys.

    Args:
        q: ``[B, S, H, D]``, any strides, any D; fp32, bf16, fp16 or fp64. With cu_seqlens
            packed: ``[T, H, D]``.
        k, v: ``[B, Sk, Hk, D]`` and ``[B, Sk, Hk, Dv]`` (packed ``[Tk, Hk, ...]``) in the dtype of
            q; H a multiple of Hk, query head h reads head ``h // (H / Hk)``.
        causal: a query sees the keys up to its own position.
        scale: of the scores; None: ``D ** -0.5``.
        window: ``(left, right)``: how many keys before and after its position a query sees; -1:
            all of them. With causal, right is 0.
        softcap: ``c`` of ``c tanh(scores / c)``, applied before any bias or mask.
        sinks: ``[H]``, any floating dtype: a logit per head that takes part in the softmax and
            has no value. Gets a gradient.
        attn_mask: broadcastable to ``[B, H, S, Sk]``; bool (False: not seen) or floating, added
            to the scores; a floating one may require a gradient. Not with cu_seqlens.
        cu_seqlens: int32 or int64 ``[sequences + 1]``, rising from 0 to T: where each packed
            sequence begins in q; cu_seqlens_k likewise for k and v, cu_seqlens when None.
        alibi_slopes: ``[H]`` or ``[B, H]``; ``slope * |distance|`` is subtracted. Not
            differentiated.
        dropout_p: probability of dropping a weight, 0 to 1, resolution 1/65536. Counter based
            (Philox4x32-7): nothing is stored, a recomputed forward drops the same weights. Row:
            the query's position in its sequence; column: the key's; stream: ``b H + h``.
        seed: int or int64 tensor of one element; None draws one from torch's generator.
        return_lse: also return the log-sum-exp of the scores, the sink's term included.
        deterministic: True: the same bits from run to run. Every backend keeps to it; False
            allows ``aten`` on a GPU kernels of libraries that add in any order.
        backend: None or ``auto``, ``reference``, ``aten``, ``triton``. A backend asked for by name
            never falls back.

    Under ``torch.autocast`` q, k and v are converted to the autocast dtype.

    Returns:
        ``[B, S, H, Dv]`` (packed ``[T, H, Dv]``) in the (autocast) dtype of q; with return_lse
        also ``[B, H, S]`` (packed ``[H, T]``), fp32 (fp64 for fp64), differentiable. A query
        that sees nothing gives 0 and (without sinks) -inf, and gradients of 0.

    Raises:
        InvalidArgumentError: shape, dtype, device or value of an argument; the message names it.
        BackendUnavailableError: `backend` was given and cannot run this problem.

    Source: Vaswani et al. 2017, arXiv 1706.03762; formulas and gradients in reference.py.
    """
    validate.check_options(
        causal=causal, scale=scale, window=window, softcap=softcap, dropout_p=dropout_p,
        return_lse=return_lse, deterministic=deterministic,
    )  # fmt: skip
    autocast = (
        isinstance(q, Tensor)
        and q.device.type != "meta"
        and torch.is_autocast_enabled(q.device.type)
    )
    validate.check_tensors(q, k, v, sinks, attn_mask, alibi_slopes, autocast)
    validate.check_packing(q, k, attn_mask, cu_seqlens, cu_seqlens_k)
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    validate.check_biases(q, k, v, batch, sinks, attn_mask, alibi_slopes)
    if autocast and q.dtype != torch.float64:
        low = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(low), k.to(low), v.to(low)
    name = _dispatch.requested_backend(backend)
    left, right = (-1, -1) if window is None else (int(window[0]), int(window[1]))
    if attn_mask is not None:
        attn_mask = attn_mask.view((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach()
        if alibi_slopes.dim() == 1:
            alibi_slopes = alibi_slopes.unsqueeze(0)
    if torch.compiler.is_compiling():  # an autograd function is not traced with one tensor twice
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
    options = (
        float(q.shape[-1] ** -0.5 if scale is None else scale),
        [left, 0 if causal else right], float(softcap or 0.0), float(dropout_p), deterministic,
    )  # fmt: skip
    tensors = (
        q, k, v, sinks, attn_mask, cu_seqlens, cu_seqlens_k, alibi_slopes,
        validate.make_seed(seed, dropout_p, q.device),
    )  # fmt: skip
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out, lse = autograd.AttentionFunction.apply(*tensors, options, name, return_lse)
    else:
        out, lse = contract.fwd(*tensors, *options, name)
    return (out, lse) if return_lse else out
