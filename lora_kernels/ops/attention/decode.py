"""Attention of new queries over a cache of keys and values: validation and public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops import _dispatch
from lora_kernels.ops.attention import decode_contract, validate

MAX_SPLITS = 128


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``attention`` of the newest queries over the keys and values that a cache holds.

    The same as ``attention(q[b:b+1], k[:n], v[:n])`` for each sequence b with ``n =
    cache_seqlens[b]`` keys, the last query at the last key. Keys and values of the new tokens are
    in the cache already. Without a gradient.

    Args:
        q: ``[B, S, H, D]``, the S newest positions of each sequence, any strides; fp32, bf16, fp16
            or fp64.
        k_cache, v_cache: ``[B, C, Hk, D]`` and ``[B, C, Hk, Dv]``, C the capacity; with
            block_table pages ``[P, page, Hk, D]`` of any length, shared by all sequences. What lies
            past a sequence's keys is not used, whatever it holds.
        cache_seqlens: int32 or int64 ``[B]``: keys of each sequence, the new ones among them.
        block_table: int32 or int64 ``[B, pages]``: key j of sequence b is in page
            ``block_table[b, j // page]``; entries past the sequence's keys are not read.
        causal, scale, window, softcap, sinks, alibi_slopes, return_lse: as of ``attention``, but
            causal by default, which is no restriction for a single query.
        num_splits: over how many programs a sequence's keys are split, 1 to 128; None chooses. The
            partial results are added in one order; another number of splits rounds otherwise.
        backend: None or ``auto``, ``reference``, ``aten``, ``cpu``, ``triton``.

    Returns:
        ``[B, S, H, Dv]`` in the dtype of q; with return_lse also ``[B, H, S]`` in fp32 (fp64 for
        fp64). A query that sees nothing gives 0 and (without sinks) -inf.

    Raises:
        InvalidArgumentError: shape, dtype, device or value of an argument; the message names it.
            Values of cache_seqlens and block_table are checked on the CPU; on a GPU, where that
            would wait for the device, a length out of range or a page that does not exist makes
            the sequence's output NaN.
        BackendUnavailableError: `backend` was given and cannot run this problem.

    Source: splitting of the keys as in Flash-Decoding (Dao et al. 2023), pages as in vLLM (Kwon et
    al. 2023, arXiv 2309.06180).
    """
    validate.check_options(
        causal=causal, scale=scale, window=window, softcap=softcap, dropout_p=0.0,
        return_lse=return_lse, deterministic=True,
    )  # fmt: skip
    validate.check_tensors(q, k_cache, v_cache, sinks, None, alibi_slopes, False)
    _check_cache(q, k_cache, v_cache, cache_seqlens, block_table, num_splits)
    keys, values = k_cache, v_cache
    if block_table is not None:  # their first two axes are checked above
        keys, values = (t.new_empty(q.shape[0], 0, *t.shape[2:]) for t in (k_cache, v_cache))
    validate.check_biases(q, keys, values, q.shape[0], sinks, None, alibi_slopes)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k_cache, v_cache, sinks)
    ):
        _fail("an argument requires a gradient, which is not computed; use torch.no_grad()")
    left, right = (-1, -1) if window is None else (int(window[0]), int(window[1]))
    if alibi_slopes is not None and alibi_slopes.dim() == 1:
        alibi_slopes = alibi_slopes.unsqueeze(0)
    out, lse = decode_contract.decode(
        q, k_cache, v_cache, cache_seqlens, block_table, sinks, alibi_slopes,
        float(q.shape[-1] ** -0.5 if scale is None else scale), [left, 0 if causal else right],
        float(softcap or 0.0), num_splits or 0, _dispatch.requested_backend(backend),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _fail(message: str) -> None:
    raise InvalidArgumentError(f"attention_decode: {message}")


def _check_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Any, block_table: Any,
    num_splits: Any,
) -> None:  # fmt: skip
    if q.dim() != 4:
        _fail(f"q has shape {list(q.shape)}; accepted: [B, S, H, D]")
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if t.dim() != 4:
            _fail(f"{name} has shape {list(t.shape)}; accepted: [B or pages, C or page, Hk, D]")
    batch, rank = q.shape[0], {"cache_seqlens": 1, "block_table": 2}
    given = {"cache_seqlens": cache_seqlens}
    if block_table is not None:
        given["block_table"] = block_table
    for name, t in given.items():
        if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
            what = t.dtype if isinstance(t, Tensor) else type(t).__name__
            _fail(f"{name} is {what}; accepted: an int32 or int64 tensor")
        if t.dim() != rank[name] or t.shape[0] != batch:
            form = f"[{batch}]" if rank[name] == 1 else f"[{batch}, pages]"
            _fail(f"{name} has shape {list(t.shape)}; accepted: {form}")
        if t.device != q.device:
            _fail(f"{name} is on {t.device} but q is on {q.device}; move them to one device")
    if block_table is not None:
        if k_cache.shape[:2] != v_cache.shape[:2]:
            _fail(f"v_cache has shape {list(v_cache.shape)}; accepted: pages as those of k_cache")
        if k_cache.shape[1] < 1:
            _fail(f"k_cache has shape {list(k_cache.shape)}; accepted: pages of at least one key")
    if num_splits is not None and (
        not isinstance(num_splits, int)
        or isinstance(num_splits, bool)
        or not 1 <= num_splits <= MAX_SPLITS
    ):
        _fail(f"num_splits={num_splits!r} is not usable; accepted: 1 to {MAX_SPLITS}, or None")
