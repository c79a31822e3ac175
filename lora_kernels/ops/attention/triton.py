"""attention on Triton kernels: which launches, with which tiles, into which buffers.

Inputs may have any strides. Nothing is copied but gradients of the log-sum-exp that are not
contiguous and operands whose rows lie 2^22 elements apart, and nothing here waits for the device.

    forward   one launch
    backward  row_terms; one pass for dq, one for dk and dv, one for an additive mask's gradient

CPU tensors run in Triton's interpreter when TRITON_INTERPRET=1 was set before the first launch.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels._backends import triton as backend
from lora_kernels.ops._philox import keep_scale, threshold
from lora_kernels.ops.attention import capabilities, triton_configs
from lora_kernels.ops.attention.problem import AttentionProblem

_FAR = 1 << 22  # elements between rows: a tile has at most 128 of them, and 256 columns
_ROW_TERMS = 32  # rows of a program that only reads two rows and writes one number


def supports(problem: AttentionProblem) -> tuple[bool, str]:
    """Can the kernels run `problem`, at whatever speed; the reason is for people."""
    module, reason = backend.load()
    if module is None:
        return False, reason
    if problem.device == "cpu":
        if not backend.interpreting():
            return False, "q is on cpu; Triton kernels run there with TRITON_INTERPRET=1 only"
    elif problem.device != "cuda":
        return False, f"q is on {problem.device}, the kernels work on cuda tensors"
    elif backend.interpreting():
        return False, "TRITON_INTERPRET=1 is set, which is for cpu tensors; unset it"
    elif not torch.cuda.is_available():
        return False, "torch sees no GPU here"
    else:
        name, _, _ = backend.architecture(torch.cuda.current_device())
        if name.startswith("sm_") and int(name[3:]) < 80:
            return False, f"{name} has no asynchronous copies and no bf16; sm_80 or newer is needed"
    lacking = capabilities.lacking("triton", problem.features())
    if lacking:
        return False, lacking
    if max(problem.D, problem.Dv) > triton_configs.MAX_HEAD:
        return False, (
            f"a head of {max(problem.D, problem.Dv)} is too large; "
            f"at most {triton_configs.MAX_HEAD}"
        )
    if max(problem.B * problem.H, problem.S, problem.Sk) >= 2**31:
        return False, "an extent of 2**31 or more is not supported"
    if problem.H * max(problem.D, problem.Dv) >= _FAR:
        return False, f"rows of {_FAR} elements or more are not supported"
    where = "the interpreter" if problem.device == "cpu" else "Triton"
    return True, f"{where} {module.__version__} kernels"


class _Kernels(NamedTuple):
    forward: Any
    row_terms: Any
    grad_q: Any
    grad_kv: Any
    grad_mask: Any
    interpreted: bool


@functools.cache
def _kernels() -> _Kernels:
    from triton.runtime.interpreter import InterpretedFunction

    from lora_kernels.ops.attention import triton_backward, triton_forward, triton_mask_gradient

    return _Kernels(
        triton_forward.forward,
        triton_backward.row_terms,
        triton_backward.grad_q,
        triton_backward.grad_kv,
        triton_mask_gradient.grad_mask,
        isinstance(triton_forward.forward, InterpretedFunction),
    )


def arithmetic() -> AbstractContextManager[None]:
    if not _kernels().interpreted:
        return nullcontext()
    from lora_kernels._backends import triton_interpreter

    return triton_interpreter.exact()


def on_device(t: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device; t need not be there."""
    if not t.is_cuda or t.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(t.device)


@functools.cache
def _target(device_type: str, index: int) -> triton_configs.Target:
    if device_type == "cpu":  # the interpreter takes the choices of a large device
        return triton_configs.target("sm_90", 132)
    return triton_configs.target(*backend.architecture(index))


def target_of(t: Tensor) -> triton_configs.Target:
    return _target(t.device.type, t.device.index or 0)


def reachable(t: Tensor) -> Tensor:
    """t, or a copy where offsets inside of a tile would not fit 32 bits."""
    far = any(abs(t.stride(axis)) >= _FAR for axis in (-3, -1))
    return t.contiguous() if far else t


def unit(*tensors: Tensor) -> int:
    """A power of two that divides every stride but those of columns."""
    return 8 if all(s % 8 == 0 for t in tensors for s in t.stride()[:-1]) else 1


class _Call:
    """What every launch of one call shares."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_q: Tensor | None,
        cu_k: Tensor | None, slopes: Tensor | None, seed: Tensor | None, scale: float,
        window: tuple[int, int], softcap: float, dropout_p: float,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v = q, k, v = reachable(q), reachable(k), reachable(v)
        self.varlen = cu_q is not None
        self.S, self.H, self.D = q.shape[-3:]
        self.Sk, self.HK, self.DV = k.shape[-3], k.shape[-2], v.shape[-1]
        self.B = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
        self.cu_q, self.cu_k = (q if cu_q is None else cu_q), (q if cu_k is None else cu_k)
        self.lse_strides = (0, self.S) if self.varlen else (self.H * self.S, self.S)
        left, right = window  # a side that excludes no key costs nothing
        self.window = (-1 if left >= self.Sk - 1 else left, -1 if right >= self.S - 1 else right)
        self.scalars = (scale, softcap)
        limit = 0 if seed is None else threshold(dropout_p)
        self.seed = q if seed is None or limit == 0 else seed
        self.drop = (limit, keep_scale(dropout_p) if limit else 1.0)
        self.mask, self.mask_kind = q, 0
        mask_strides: tuple[int, ...] = (0, 0, 0, 0)
        if mask is not None:
            self.mask_kind = 1 if mask.dtype == torch.bool else 2
            self.mask = mask.view(torch.uint8) if self.mask_kind == 1 else mask
            mask_strides = mask.expand(self.B, self.H, self.S, self.Sk).stride()
        self.slopes = q if slopes is None else slopes
        slope_strides: tuple[int, ...] = (0, 0)
        if slopes is not None:
            slope_strides = slopes.expand(self.B, self.H).stride()
        self.bias_strides = (mask_strides, slope_strides)
        self.where = target_of(q)
        self.burden = 2 if limit or self.mask_kind else 1 if softcap or slopes is not None else 0
        self.alibi = slopes is not None
        self.split = triton_configs.splits_loops(self.D, self.DV, self.where, self.burden)

    def tile(self, kernel: str) -> triton_configs.Tile:
        return triton_configs.choose(
            kernel, self.D, self.DV, self.q.element_size(), self.where, self.burden
        )

    def tiles(self, ends: Tensor, size: int) -> Tensor:
        """[B] int32: how many tiles of `size` rows the sequences up to each have."""
        if not self.varlen:
            return self.q
        return (ends.diff() + (size - 1)).div(size, rounding_mode="floor").cumsum(0).int()

    def grid(self, extent: int, heads: int, size: int) -> tuple[int, ...]:
        """Programs of `size` rows; of packed sequences the most that they can have."""
        if self.varlen:
            return (-(-extent // size) + self.B, heads)
        return (-(-extent // size) * self.B * heads,)

    def strides(self, t: Tensor, unit: int) -> tuple[int, ...]:
        """Of batch (0 where packed), row and head, divided by `unit`, and of columns."""
        *outer, column = t.stride()
        if self.varlen:
            outer = [0, *outer]
        return (*(s // unit for s in outer), column)

    def constants(self, tile: triton_configs.Tile, unit: int) -> dict[str, Any]:
        (d1, d2), (v1, v2) = (triton_configs.parts(n) for n in (self.D, self.DV))
        left, right = self.window
        return {
            "D": self.D, "DV": self.DV, "D1": d1, "D2": d2, "V1": v1, "V2": v2,
            "BM": tile.rows, "BN": tile.keys, "UNIT": unit,
            "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0, "SOFTCAP": self.scalars[1] != 0.0,
            "ALIBI": self.alibi, "DROPOUT": self.drop[0] != 0,
            "PRECISION": backend.precision(self.q.dtype),
            "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        }  # fmt: skip


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, attn_mask: Tensor | None,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, alibi_slopes: Tensor | None,
    seed: Tensor | None, scale: float, window: tuple[int, int], softcap: float, dropout_p: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse); every launch is deterministic, so `deterministic` asks for nothing more."""
    with on_device(q), arithmetic():
        c = _Call(
            q, k, v, attn_mask, cu_seqlens, cu_seqlens_k, alibi_slopes, seed, scale, window,
            softcap, dropout_p,
        )  # fmt: skip
        q, k, v = c.q, c.k, c.v
        out = q.new_empty((*q.shape[:-1], c.DV))
        lse = q.new_empty((*q.shape[:-3], c.H, c.S), dtype=torch.float32)
        if out.numel() == 0:
            return out, lse
        tile, step = c.tile("forward"), unit(q, k, v, out)
        _kernels().forward[c.grid(c.S, c.H, tile.rows)](
            q, k, v, out, lse, q if sinks is None else sinks, c.mask, c.slopes, c.seed, c.cu_q,
            c.cu_k, c.tiles(c.cu_q, tile.rows), *(c.strides(t, step) for t in (q, k, v, out)),
            *c.bias_strides, *c.lse_strides, c.B, c.S, c.Sk, c.H, c.H // c.HK, *c.window,
            *c.scalars, *c.drop,
            VARLEN=c.varlen, SPLIT=c.split, SINKS=sinks is not None, MASK=c.mask_kind,
            **c.constants(tile, step),
        )  # fmt: skip
        return out, lse


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    sinks: Tensor | None, attn_mask: Tensor | None, cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None, alibi_slopes: Tensor | None, seed: Tensor | None, scale: float,
    window: tuple[int, int], softcap: float, dropout_p: float, deterministic: bool,
    needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, sinks and attn_mask, the last two in fp32; None where `needs` does not
    ask."""
    with on_device(q), arithmetic():
        c = _Call(
            q, k, v, attn_mask, cu_seqlens, cu_seqlens_k, alibi_slopes, seed, scale, window,
            softcap, dropout_p,
        )  # fmt: skip
        lse, out, dout = lse.contiguous(), reachable(out), reachable(dout)
        delta, dsinks = _row_terms(c, dout, dlse, out, lse, sinks if needs[3] else None)
        dq = _grad_q(c, dout, lse, delta) if needs[0] else None
        dk, dv = _grad_kv(c, dout, lse, delta) if needs[1] or needs[2] else (None, None)
        dmask = None
        if needs[4] and attn_mask is not None:
            dmask = _grad_mask(c, dout, lse, delta, attn_mask)
        return [dq, dk, dv, dsinks, dmask]


def _row_terms(
    c: _Call, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """delta as lse, and the gradient of the sinks."""
    delta = torch.empty_like(lse)
    if out.numel() == 0:
        return delta, None if sinks is None else sinks.new_zeros(c.H, dtype=torch.float32)
    grid = c.grid(c.S, c.H, _ROW_TERMS)
    per_head = grid[0] if c.varlen else grid[0] // c.H
    part = lse.new_empty((c.H, per_head) if sinks is not None else 0)
    step = unit(out, dout)
    v1, v2 = triton_configs.parts(c.DV)
    _kernels().row_terms[grid](
        out, dout, lse, lse if dlse is None else dlse.to(torch.float32).contiguous(), delta,
        lse if sinks is None else sinks, part, c.cu_q, c.tiles(c.cu_q, _ROW_TERMS),
        c.strides(out, step), c.strides(dout, step), *c.lse_strides, c.B, c.S, c.H,
        DV=c.DV, V1=v1, V2=v2, BM=_ROW_TERMS, UNIT=step, VARLEN=c.varlen,
        SINKS=sinks is not None, DLSE=dlse is not None, num_warps=4,
    )  # fmt: skip
    return delta, None if sinks is None else part.sum(1)


def _grad_q(c: _Call, dout: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    dq = c.q.new_empty(c.q.shape)
    if dq.numel() == 0:
        return dq
    tile, step = c.tile("grad_q"), unit(c.q, c.k, c.v, dout, dq)
    _kernels().grad_q[c.grid(c.S, c.H, tile.rows)](
        c.q, c.k, c.v, dout, lse, delta, dq, c.mask, c.slopes, c.seed, c.cu_q, c.cu_k,
        c.tiles(c.cu_q, tile.rows), *(c.strides(t, step) for t in (c.q, c.k, c.v, dout, dq)),
        *c.bias_strides, *c.lse_strides, c.B, c.S, c.Sk, c.H, c.H // c.HK, *c.window, *c.scalars,
        *c.drop, VARLEN=c.varlen, SPLIT=c.split, MASK=c.mask_kind, **c.constants(tile, step),
    )  # fmt: skip
    return dq


def _grad_kv(c: _Call, dout: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    dk, dv = c.k.new_empty(c.k.shape), c.v.new_empty(c.v.shape)
    if dk.numel() == 0:
        return dk, dv
    tile, step = c.tile("grad_kv"), unit(c.q, c.k, c.v, dout, dk, dv)
    _kernels().grad_kv[c.grid(c.Sk, c.HK, tile.keys)](
        c.q, c.k, c.v, dout, lse, delta, dk, dv, c.mask, c.slopes, c.seed, c.cu_q, c.cu_k,
        c.tiles(c.cu_k, tile.keys), *(c.strides(t, step) for t in (c.q, c.k, c.v, dout, dk, dv)),
        *c.bias_strides, *c.lse_strides, c.B, c.S, c.Sk, c.HK, c.H // c.HK, *c.window, *c.scalars,
        *c.drop, VARLEN=c.varlen, MASK=c.mask_kind, **c.constants(tile, step),
    )  # fmt: skip
    return dk, dv


def _grad_mask(c: _Call, dout: Tensor, lse: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
    dmask = mask.new_empty(mask.shape, dtype=torch.float32)
    if 0 in (c.B, c.S, c.Sk):
        return dmask.zero_()
    tile, step = c.tile("grad_mask"), unit(c.q, c.k, c.v, dout)
    batches, heads, rows, keys = mask.shape
    row_tiles = 1 if rows == 1 else -(-c.S // tile.rows)
    key_tiles = 1 if keys == 1 else -(-c.Sk // tile.keys)
    _kernels().grad_mask[(row_tiles * key_tiles * batches * heads,)](
        c.q, c.k, c.v, dout, lse, delta, dmask, mask, c.slopes, c.seed,
        *(c.strides(t, step) for t in (c.q, c.k, c.v, dout)), dmask.stride(), *c.bias_strides,
        *c.lse_strides, c.S, c.Sk, c.H, c.H // c.HK, heads, c.B // batches, c.H // heads,
        *c.window, *c.scalars, *c.drop, row_tiles, key_tiles,
        ALL_ROWS=rows == 1, ALL_KEYS=keys == 1, **c.constants(tile, step),
    )  # fmt: skip
    return dmask
