"""What the kernels that aten calls on a GPU compute, in plain PyTorch, for their stand-ins: one
problem with the conventions as fields, and FlashAttention's around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Kernel:
    """What one call is asked; z holds scores of [B, S, H, D] operands as a kernel makes them."""

    scale: float
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    bias: Tensor | None = None
    slopes: Tensor | None = None
    top_left: bool = False
    causal_alibi: bool = False

    def scores(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q.float().transpose(1, 2), k.float().transpose(1, 2)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        z = self.scale * (q @ k.mT)
        slope = torch.ones_like(z)
        if self.softcap:
            t = torch.tanh(z / self.softcap)
            z, slope = self.softcap * t, 1.0 - t * t
        rows, keys = z.shape[2:]
        at = torch.arange(rows)[:, None] + (0 if self.top_left else keys - rows)
        j = torch.arange(keys)
        if self.slopes is not None:
            slopes = self.slopes.view(-1, q.shape[1], 1, 1)
            z = z + slopes * j if self.causal_alibi else z - slopes * (at - j).abs()
        if self.bias is not None:
            z = z + self.bias.float()
        hidden = torch.zeros(rows, keys, dtype=torch.bool)
        if self.left >= 0:
            hidden |= j < at - self.left
        if self.right >= 0:
            hidden |= j > at + self.right
        return z.masked_fill(hidden, -torch.inf), slope

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        z, _ = self.scores(q, k)
        blind = (z == -torch.inf).all(-1)
        lse = z.masked_fill(blind[..., None], 0.0).logsumexp(-1) if z.shape[-1] else z.sum(-1)
        p = torch.exp(z - lse[..., None])
        heads = v.float().transpose(1, 2).repeat_interleave(q.shape[2] // v.shape[2], 1)
        out = (p @ heads).transpose(1, 2).to(q.dtype)
        return out.contiguous(), lse.masked_fill(blind, torch.inf)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        dlse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        z, slope = self.scores(q, k)
        p = torch.exp(z - lse[..., None])
        group = q.shape[2] // k.shape[2]
        wide = [t.float().transpose(1, 2) for t in (dout, q, k, v, out)]
        do, qh, kh, vh, oh = (
            t.repeat_interleave(group, 1) if n in (2, 3) else t for n, t in enumerate(wide)
        )
        delta = (do * oh).sum(-1)
        if dlse is not None:
            delta = delta - dlse
        dz = p * (do @ vh.mT - delta[..., None]) * slope
        dk, dv = (t.unflatten(1, (k.shape[2], group)).sum(2) for t in (dz.mT @ qh, p.mT @ do))
        grads = (self.scale * (dz @ kh), self.scale * dk, dv)
        return tuple(t.transpose(1, 2).to(q.dtype).contiguous() for t in grads)


def packed(step: Any, ends: Tensor, ends_k: Tensor, tensors: list[Any], of_keys: str) -> list[Any]:
    """step on each sequence; `of_keys`: letter per tensor, q, k or l ([H, T])."""
    parts = []
    for b in range(len(ends) - 1):
        rows, keys = (slice(int(e[b]), int(e[b + 1])) for e in (ends, ends_k))
        cut = {"q": lambda t, r=rows: t[None, r], "k": lambda t, r=keys: t[None, r],
               "l": lambda t, r=rows: t[None, :, r]}  # fmt: skip
        parts.append(
            step(
                b,
                *(None if t is None else cut[c](t) for t, c in zip(tensors, of_keys, strict=True)),
            )
        )
    return [list(column) for column in zip(*parts, strict=True)]


@dataclass
class Log:
    """Keywords of every call, by name of the function; `fault` makes the kernels wrong."""

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    fault: str = ""

    def of(self, name: str) -> list[dict[str, Any]]:
        return [keywords for called, keywords in self.calls if called == name]

    def kernel(self, **keywords: Any) -> Kernel:
        kernel = Kernel(**keywords)
        if self.fault == "top-left":
            kernel.top_left = True
        if self.fault == "exclusive" and kernel.left > 0:
            kernel.left -= 1
        if self.fault == "no softcap":
            kernel.softcap = 0.0
        if self.fault == "scale":
            kernel.scale *= 1.2
        return kernel

    def lse(self, lse: Tensor) -> Tensor:
        return lse / torch.log(torch.tensor(2.0)) if self.fault == "base 2" else lse


def even_rows(*tensors: Tensor, same: bool = True) -> None:
    """What these kernels ask of their operands and some of them do not check."""
    for t in tensors:
        size = t.element_size()
        assert t.stride(-1) == 1 and t.shape[-1] * size % 16 == 0 and t.data_ptr() % 16 == 0
        axes = zip(t.stride()[:-1], t.shape[:-1], strict=True)
        assert all(stride * size % 16 == 0 for stride, extent in axes if extent > 1)
    assert not same or len({t.shape[-1] for t in tensors}) == 1


def half_precision(*tensors: Tensor) -> None:
    assert all(t.dtype in (torch.bfloat16, torch.float16) for t in tensors)


class FlashAttention:
    """FlashAttention 2, dense and packed, as the package and torch's operators share it."""

    def __init__(self, log: Log, empty_lse: float = torch.inf) -> None:
        self.log, self.empty_lse = log, empty_lse

    def _kernel(self, b: int, group: int, keys: int, o: dict[str, Any], longest: int) -> Kernel:
        left, right, slopes = o["left"], o["right"], o.get("slopes")
        if o.get("second"):  # windows as version 2 cuts them off
            left, right = (-1 if side >= longest else side for side in (left, right))
        if o["causal"]:
            right = 0
        if slopes is not None:
            assert slopes.dtype == torch.float32 and slopes.is_contiguous()
            slopes = slopes if slopes.dim() == 1 else slopes[b] if o["packed"] else slopes
        return self.log.kernel(
            scale=o["scale"], left=left, right=right, softcap=o.get("softcap", 0.0),
            slopes=slopes, causal_alibi=slopes is not None and (left, right) == (-1, 0),
        )  # fmt: skip

    def forward(self, q: Tensor, k: Tensor, v: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor]:
        even_rows(q, k, v, same=not o.get("apart"))
        half_precision(q, k, v)
        group = q.shape[-2] // k.shape[-2]
        cu, cu_k = o.get("cu"), o.get("cu_k")
        o["packed"] = cu is not None
        if cu is None:
            kernel = self._kernel(0, group, k.shape[1], o, k.shape[1])
            out, lse = kernel.forward(q, k, v)
        else:
            assert cu.dtype == cu_k.dtype == torch.int32 and cu.is_contiguous()
            assert o["max_q"] >= int(cu.diff().max()) and o["max_k"] == int(cu_k.diff().max())
            if o.get("second") and o["max_q"] == 1 and group > 1:
                assert q.shape[0] == len(cu) - 1  # heads of a group become rows

            def step(b: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                out, lse = self._kernel(b, group, k.shape[1], o, o["max_k"]).forward(q, k, v)
                return out[0], lse[0]

            outs, lses = packed(step, cu, cu_k, [q, k, v], "qkk")
            out, lse = torch.cat(outs), torch.cat(lses, 1)
        return out, self.log.lse(lse.masked_fill(lse == torch.inf, self.empty_lse))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        o: dict[str, Any], dlse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        even_rows(dout, q, k, v, out, same=not o.get("apart"))
        half_precision(dout, q, k, v, out)
        assert lse.dtype == torch.float32 and lse.is_contiguous()
        if self.empty_lse > 0:
            assert not (lse == -torch.inf).any()
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        group = q.shape[-2] // k.shape[-2]
        cu, cu_k = o.get("cu"), o.get("cu_k")
        o["packed"] = cu is not None
        if cu is None:
            kernel = self._kernel(0, group, k.shape[1], o, k.shape[1])
            return kernel.backward(dout, q, k, v, out, lse, dlse)

        def step(b: int, *part: Any) -> tuple[Tensor, ...]:
            kernel = self._kernel(b, group, part[2].shape[1], o, o["max_k"])
            return tuple(t[0] for t in kernel.backward(*part))

        made = packed(step, cu, cu_k, [dout, q, k, v, out, lse, dlse], "qqkkqll")
        return tuple(torch.cat(column) for column in made)
