"""Stand-ins for the kernels that aten calls on a GPU: their signatures, and what they are
documented to compute, in plain PyTorch on a CPU.

Conventions are the libraries', not ours: +inf as the log-sum-exp of a row that sees nothing,
FlashAttention 2's ALiBi under a causal mask and its windows, lengths of the log-sum-exp, masks by
number. torch's operators are also called with meta tensors, so arguments have to match the schema,
and shapes what torch says of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention
from torch import Tensor

from lora_kernels.ops.attention import aten, decode_aten, libraries
from lora_kernels.ops.attention.libraries import (
    cudnn,
    efficient,
    flash,
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
    flex,
    here,
    proof,
)
from tests.ops.attention_kernel_standins import FlashAttention, Kernel, Log, even_rows

REAL = {
    name: getattr(torch.ops.aten, name).default
    for name in (
        "_flash_attention_forward", "_flash_attention_backward", "_efficient_attention_forward",
        "_efficient_attention_backward", "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_cudnn_attention_backward",
    )
}  # fmt: skip


class TorchFlash(FlashAttention):
    def fwd(self, q, k, v, cu, cu_k, max_q, max_k, dropout_p, causal, debug, **keywords):
        _like_meta("_flash_attention_forward", (q, k, v, cu, cu_k, max_q, max_k, dropout_p, causal,
                                                debug), keywords)  # fmt: skip
        assert dropout_p == 0.0 and not debug
        self.log.calls.append(("flash fwd", keywords))
        if keywords.get("seqused_k") is not None:
            return self._of_a_cache(q, k, v, cu, cu_k, causal, keywords)
        out, lse = self.forward(q, k, v, self._options(cu, cu_k, max_q, max_k, causal, keywords))
        return out, lse, None, None, None

    def _of_a_cache(self, q, k, v, cu, cu_k, causal, keywords):
        """Of each sequence's keys the first `seqused_k`."""
        used, o = keywords["seqused_k"], self._options(cu, cu_k, 0, 0, causal, keywords)
        assert used.dtype == torch.int32 and used.is_contiguous()
        even_rows(q, k, v)
        outs, lses = [], []
        for b, n in enumerate(used.tolist()):
            rows, first = slice(int(cu[b]), int(cu[b + 1])), int(cu_k[b])
            kernel = self.log.kernel(
                scale=o["scale"], left=o["left"], right=0 if causal else o["right"]
            )
            out, lse = kernel.forward(q[None, rows], *(t[None, first : first + n] for t in (k, v)))
            outs.append(out[0])
            lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses, 1), None, None, None

    def bwd(self, dout, q, k, v, out, lse, cu, cu_k, max_q, max_k, dropout_p, causal, seed, unused,
            **keywords):  # fmt: skip
        _like_meta("_flash_attention_backward", (dout, q, k, v, out, lse, cu, cu_k, max_q, max_k,
                   dropout_p, causal, seed, unused), keywords)  # fmt: skip
        flags = {"deterministic": torch.are_deterministic_algorithms_enabled()}
        self.log.calls.append(("flash bwd", {**keywords, **flags}))
        o = self._options(cu, cu_k, max_q, max_k, causal, keywords)
        return self.backward(dout, q, k, v, out, lse, o)

    def _options(self, cu, cu_k, max_q, max_k, causal, keywords):
        return {
            "cu": cu, "cu_k": cu_k, "max_q": max_q, "max_k": max_k, "causal": causal,
            "scale": keywords["scale"], "left": keywords["window_size_left"],
            "right": keywords["window_size_right"], "second": True,
        }  # fmt: skip


KINDS = {"Tensor": Tensor, "Optional[Tensor]": (Tensor, type(None)), "int": int, "float": float,
         "Optional[int]": (int, type(None)), "Optional[float]": (float, type(None)), "bool": bool,
         "SymInt": int, "Optional[SymInt]": (int, type(None))}  # fmt: skip
UNDEFINED = ("cum_seq_q", "cum_seq_k", "attn_bias")  # a Tensor that may be left out all the same
NO_META = ("_efficient_attention_backward",)  # torch's own lacks an argument of the schema


def _like_meta(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Every argument fits torch's schema, and torch's operator takes them as meta tensors."""
    schema = REAL[name]._schema.arguments
    positional = [a for a in schema if not a.kwarg_only]
    assert len(arguments) == len(positional)
    assert set(keywords) <= {a.name for a in schema if a.kwarg_only}
    given = {**dict(zip([a.name for a in positional], arguments, strict=True)), **keywords}
    for a in schema:
        if a.name in given and not (a.name in UNDEFINED and given[a.name] is None):
            assert isinstance(given[a.name], KINDS[str(a.type)]), f"{a.name}: {a.type}"

    def meta(t: Any) -> Any:
        return t.to("meta") if isinstance(t, Tensor) else t

    if name in NO_META:
        return None
    return REAL[name](*map(meta, arguments), **{n: meta(t) for n, t in keywords.items()})


def with_kvcache(
    log: Log, name: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    pages: Tensor | None, scale: float, causal: bool, window: tuple[int, int], softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both packages' flash_attn_with_kvcache without new keys."""
    log.calls.append((name, {"pages": pages is not None}))
    even_rows(k_cache, v_cache)
    assert cache_seqlens.dtype == torch.int32
    outs, lses = [], []
    for b, n in enumerate(cache_seqlens.tolist()):
        k, v = (
            t[b] if pages is None else t[pages[b].long()].flatten(0, 1) for t in (k_cache, v_cache)
        )
        kernel = log.kernel(
            scale=scale, left=window[0], right=0 if causal else window[1], softcap=softcap
        )
        out, lse = kernel.forward(q[b : b + 1], k[None, :n], v[None, :n])
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


class Package2(FlashAttention):
    """flash_attn.flash_attn_interface."""

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, *, cache_seqlens, block_table=None, softmax_scale, causal,
        window_size, softcap, num_splits, return_softmax_lse,
    ):  # fmt: skip
        assert return_softmax_lse and (block_table is None or k_cache.shape[1] % 256 == 0)
        return with_kvcache(self.log, "fa2 cache", q, k_cache, v_cache, cache_seqlens, block_table,
                            softmax_scale, causal, window_size, softcap)  # fmt: skip

    def _flash_attn_forward(
        self, q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, return_softmax,
    ):  # fmt: skip
        assert dropout_p == 0.0 and not return_softmax
        o = {"scale": softmax_scale, "causal": causal, "left": window_size_left,
             "right": window_size_right, "softcap": softcap, "slopes": alibi_slopes,
             "second": True}  # fmt: skip
        self.log.calls.append(("fa2 fwd", o))
        return *self.forward(q, k, v, o), None, None

    def _flash_attn_varlen_forward(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
        alibi_slopes=None, return_softmax=False, block_table=None,
    ):  # fmt: skip
        o = {"scale": softmax_scale, "causal": causal, "left": window_size_left,
             "right": window_size_right, "softcap": softcap, "slopes": alibi_slopes,
             "cu": cu_seqlens_q, "cu_k": cu_seqlens_k, "max_q": max_seqlen_q,
             "max_k": max_seqlen_k, "second": True}  # fmt: skip
        return *self.forward(q, k, v, o), None, None

    def _flash_attn_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        o = {"scale": softmax_scale, "causal": causal, "left": window_size_left,
             "right": window_size_right, "softcap": softcap, "slopes": alibi_slopes,
             "second": True}  # fmt: skip
        self.log.calls.append(("fa2 bwd", {"deterministic": deterministic}))
        for into, made in zip((dq, dk, dv), self.backward(dout, q, k, v, out, softmax_lse, o),
                              strict=True):  # fmt: skip
            into.copy_(made)

    def _flash_attn_varlen_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        o = {"scale": softmax_scale, "causal": causal, "left": window_size_left,
             "right": window_size_right, "softcap": softcap, "slopes": alibi_slopes,
             "cu": cu_seqlens_q, "cu_k": cu_seqlens_k, "max_q": max_seqlen_q,
             "max_k": max_seqlen_k, "second": True}  # fmt: skip
        for into, made in zip((dq, dk, dv), self.backward(dout, q, k, v, out, softmax_lse, o),
                              strict=True):  # fmt: skip
            into.copy_(made)


class Package3(FlashAttention):
    """torch.ops.flash_attn_3, and flash_attn_interface."""

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, *, cache_seqlens, page_table=None, softmax_scale, causal,
        window_size, softcap, num_splits, return_softmax_lse,
    ):  # fmt: skip
        assert return_softmax_lse
        return with_kvcache(self.log, "fa3 cache", q, k_cache, v_cache, cache_seqlens, page_table,
                            softmax_scale, causal, window_size, softcap)  # fmt: skip

    def operators(self) -> Any:
        return SimpleNamespace(
            fwd=SimpleNamespace(default=self.fwd), bwd=SimpleNamespace(default=self.bwd)
        )

    def fwd(
        self, q, k, v, *, softmax_scale=None, is_causal=False, window_size_left=-1,
        window_size_right=-1, softcap=0.0, cu_seqlens_q=None, cu_seqlens_k=None,
        max_seqlen_q=None, max_seqlen_k=None, num_splits=0,
    ):  # fmt: skip
        assert num_splits == 1
        o = {"scale": softmax_scale, "causal": is_causal, "left": window_size_left,
             "right": window_size_right, "softcap": softcap, "cu": cu_seqlens_q,
             "cu_k": cu_seqlens_k, "max_q": max_seqlen_q, "max_k": max_seqlen_k}  # fmt: skip
        return *self.forward(q, k, v, o), None, None

    def bwd(
        self, dout, q, k, v, out, softmax_lse, *, dq=None, dk=None, dv=None, softmax_scale=None,
        is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
        cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        deterministic=False,
    ):  # fmt: skip
        o = {"scale": softmax_scale, "causal": is_causal, "left": window_size_left,
             "right": window_size_right, "softcap": softcap, "cu": cu_seqlens_q,
             "cu_k": cu_seqlens_k, "max_q": max_seqlen_q, "max_k": max_seqlen_k}  # fmt: skip
        self.log.calls.append(("fa3 bwd", {"deterministic": deterministic}))
        made = self.backward(dout, q, k, v, out, softmax_lse, o)
        for into, t in zip((dq, dk, dv), made, strict=True):
            into.copy_(t)
        return (softmax_lse,) * 5


class Package4(FlashAttention):
    """flash_attn.cute.interface."""

    def _options(self, o: dict[str, Any]) -> dict[str, Any]:
        sides = (-1 if o[n] is None else o[n] for n in ("window_size_left", "window_size_right"))
        left, right = sides
        return {"scale": o["softmax_scale"], "causal": o["causal"], "left": left, "right": right,
                "softcap": o["softcap"] or 0.0, "cu": o["cu_seqlens_q"],
                "cu_k": o["cu_seqlens_k"], "max_q": o["max_seqlen_q"],
                "max_k": o["max_seqlen_k"], "apart": True}  # fmt: skip

    def _flash_attn_fwd(
        self, q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, return_lse=False,
    ):  # fmt: skip
        o = {n: t for n, t in locals().items() if n not in ("self", "q", "k", "v")}
        assert return_lse
        return *self.forward(q, k, v, self._options(o)), None, None

    def _flash_attn_bwd(
        self, q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0,
        window_size_left=None, window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
        dlse=None,
    ):  # fmt: skip
        o = {n: t for n, t in locals().items() if n not in ("self", "q", "k", "v")}
        self.log.calls.append(("fa4 bwd", {"deterministic": deterministic}))
        return self.backward(dout, q, k, v, out, lse, self._options(o), dlse)


class TorchEfficient:
    def __init__(self, log: Log) -> None:
        self.log = log

    def _kernel(self, kind: int, scale: float, bias: Tensor | None) -> Kernel:
        kernel = self.log.kernel(scale=scale, right=0 if kind else -1, bias=bias)
        kernel.top_left = kernel.top_left or kind == 1
        return kernel

    def _operands(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
        even_rows(q, k, v, same=False)
        assert q.shape[2] == k.shape[2] == v.shape[2] and q.shape[3] == k.shape[3]
        if bias is not None:
            assert bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
            assert bias.dtype == q.dtype and bias.stride(3) == 1
            assert all(s * bias.element_size() % 16 == 0 for s in bias.stride()[:3])

    def fwd(self, q, k, v, bias, cu, cu_k, max_q, max_k, dropout_p, kind, compute_lse, **keywords):
        meta = _like_meta("_efficient_attention_forward", (q, k, v, bias, cu, cu_k, max_q, max_k,
                          dropout_p, kind, compute_lse), keywords)  # fmt: skip
        self._operands(q, k, v, bias)
        assert dropout_p == 0.0 and compute_lse
        out, lse = self._kernel(kind, keywords["scale"], bias).forward(q, k, v)
        blind = lse == torch.inf  # whatever there is
        out = out.masked_fill(blind.transpose(1, 2)[..., None], torch.nan)
        lse = lse.masked_fill(blind, torch.nan)
        wide = torch.full(meta[1].shape, torch.inf)
        wide[..., : q.shape[1]] = self.log.lse(lse)
        return out, wide, None, None, None, None

    def bwd(self, dout, q, k, v, bias, out, cu, cu_k, max_q, max_k, lse, dropout_p, seed, offset,
            kind, of_bias, **keywords):  # fmt: skip
        _like_meta("_efficient_attention_backward", (dout, q, k, v, bias, out, cu, cu_k, max_q,
                   max_k, lse, dropout_p, seed, offset, kind, of_bias), keywords)  # fmt: skip
        self._operands(q, k, v, bias)
        even_rows(dout, out)
        rows = q.shape[1]
        assert lse.shape[-1] % 32 == 0 and lse.shape[-1] - rows < 32 and not of_bias
        self.log.calls.append(("efficient bwd", keywords))
        kernel = self._kernel(kind, keywords["scale"], bias)
        return *kernel.backward(dout, q, k, v, out, lse[..., :rows]), None


class TorchCudnn:
    def __init__(self, log: Log, axes: int = 4) -> None:
        self.log, self.axes = log, axes

    def fwd(self, q, k, v, bias, compute_lse, dropout_p, causal, debug, **keywords):
        _like_meta("_scaled_dot_product_cudnn_attention", (q, k, v, bias, compute_lse, dropout_p,
                   causal, debug), keywords)  # fmt: skip
        assert bias is None and compute_lse and dropout_p == 0.0 and not debug
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        even_rows(q, k, v, same=False)
        kernel = self.log.kernel(scale=keywords["scale"], right=0 if causal else -1)
        kernel.top_left = True
        out, lse = kernel.forward(q, k, v)
        return out.transpose(1, 2), self.log.lse(lse[..., None] if self.axes == 4 else lse)

    def bwd(self, dout, q, k, v, out, lse, seed, offset, bias, cu, cu_k, max_q, max_k, dropout_p,
            causal, **keywords):  # fmt: skip
        _like_meta("_scaled_dot_product_cudnn_attention_backward", (dout, q, k, v, out, lse, seed,
                   offset, bias, cu, cu_k, max_q, max_k, dropout_p, causal), keywords)  # fmt: skip
        assert lse.dim() == self.axes and bias is None
        dout, q, k, v, out = (t.transpose(1, 2) for t in (dout, q, k, v, out))
        kernel = self.log.kernel(scale=keywords["scale"], right=0 if causal else -1)
        kernel.top_left = True
        grads = kernel.backward(dout, q, k, v, out, lse.reshape(dout.transpose(1, 2).shape[:3]))
        return tuple(g.transpose(1, 2) for g in grads)


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, *, score_mod: Any, block_mask: Any, scale: float,
    enable_gqa: bool, return_aux: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """FlexAttention's formula with all scores, its functions asked at every index at once."""
    assert enable_gqa == (query.shape[1] != key.shape[1]) and return_aux.lse
    group = query.shape[1] // key.shape[1]
    k, v = (t.float().repeat_interleave(group, 1) for t in (key, value))
    z = (query.float() @ k.mT) * scale
    axes = [torch.arange(n).view(-1, *(1,) * (3 - a)) for a, n in enumerate(z.shape)]
    if score_mod is not None:
        z = score_mod(z, *axes)
    if block_mask is not None:
        b, h = (axes[0], axes[1]) if block_mask.shape[0] > 1 else (torch.zeros(1).long(),) * 2
        z = z.masked_fill(~block_mask.mask_mod(b, h, *axes[2:]), -torch.inf)
    blind = (z == -torch.inf).all(-1, keepdim=True)
    z = z.masked_fill(blind, 0.0)
    out = (z.softmax(-1).masked_fill(blind, 0.0) @ v).to(query.dtype)
    lse = z.logsumexp(-1) if z.shape[-1] else z.sum(-1)
    return out, SimpleNamespace(lse=lse.masked_fill(blind[..., 0], -torch.inf))


@dataclass(frozen=True)
class Pretended(here.Device):
    """The CPU as if it were a GPU of that compute capability."""

    @property
    def name(self) -> str:
        return "cpu"


def install(monkeypatch: pytest.MonkeyPatch, arch: tuple[int, int] = (9, 0)) -> Log:
    """All stand-ins in place of their kernels, and a CPU that counts as a GPU with libraries."""
    log = Log()
    torch_flash, torch_efficient, torch_cudnn = (
        TorchFlash(log),
        TorchEfficient(log),
        TorchCudnn(log),
    )
    steps = ((flash, torch_flash), (efficient, torch_efficient), (cudnn, torch_cudnn))
    for module, made in steps:
        monkeypatch.setattr(module, "_forward", made.fwd)
        monkeypatch.setattr(module, "_backward", made.bwd)
    packages = {
        flash_attn_2.PACKAGE: Package2(log), flash_attn_3.PACKAGE: Package3(log),
        flash_attn_4.PACKAGE: Package4(log, -torch.inf),
    }  # fmt: skip
    real = here.load

    def load(name: str) -> tuple[Any, str]:
        return (packages[name], "") if name in packages else real(name)

    for module in (flash_attn_2, flash_attn_3, flash_attn_4):
        monkeypatch.setattr(module, "load", load)
    operators = packages[flash_attn_3.PACKAGE].operators()
    monkeypatch.setattr(flash_attn_3, "_operators", lambda: operators)
    monkeypatch.setattr(flex, "_kernel", lambda compiled: flex_attention)
    monkeypatch.setattr(
        torch.nn.attention.flex_attention, "create_block_mask",
        lambda seen, batch, *rest, **more: SimpleNamespace(mask_mod=seen, shape=(batch or 1,)),
    )  # fmt: skip
    monkeypatch.setattr(cudnn, "_axes", [])
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(aten, "_has_libraries", lambda t: True)
    monkeypatch.setattr(decode_aten, "_on_gpu", lambda t: True)
    monkeypatch.setattr(here, "load", load)
    monkeypatch.setattr(here, "device", lambda: Pretended(0, arch))
    monkeypatch.setattr(proof, "_known", {})
    libraries.static.cache_clear()
    return log
