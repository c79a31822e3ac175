"""attention over library calls. On a CPU: SDPA, whole or in bands, where that covers every
argument, else blocks. On a GPU: one of the kernels of libraries/, else blocks.

Packed sequences that no kernel takes at once are taken one by one, each by the path that fits it.
Which path, and why, is decided from the tables of capabilities.py and libraries/table.py; formulas
are in reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops.attention import bands, blocked, capabilities, libraries, sdpa
from lora_kernels.ops.attention.libraries import form
from lora_kernels.ops.attention.operands import Operands, sequences


def _has_libraries(t: Tensor) -> bool:
    return t.device.type == "cuda"


def _forward(d: Operands) -> tuple[Tensor, Tensor]:
    if _has_libraries(d.q):
        library = libraries.pick(d, None, "fwd")
        return libraries.forward(library, d, None) if library else blocked.forward(d)
    path, _ = capabilities.aten_path(d.problem().features())
    if path == "blocked":
        return blocked.forward(d)
    return sdpa.forward(d) if path == "sdpa" else bands.forward(d)


def _backward(
    dout: Tensor, dlse: Tensor | None, d: Operands, out: Tensor, lse: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    gradients = {"mask_gradient": needs[4], "lse_gradient": dlse is not None}
    if _has_libraries(d.q):
        library = libraries.pick(d, None, "bwd", **gradients)
        if library:
            return libraries.backward(library, dout, dlse, d, None, out, lse, needs)
        return blocked.backward(dout, dlse, d, out, lse, needs)
    path, _ = capabilities.aten_path(d.problem(**gradients).features())
    if path == "sdpa":
        return [*sdpa.backward(dout, d, out, lse, needs), None]
    if path == "bands":
        return [*bands.backward(dout, d, out, lse, needs), None]
    return blocked.backward(dout, dlse, d, out, lse, needs)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, attn_mask: Tensor | None,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, alibi_slopes: Tensor | None,
    seed: Tensor | None, scale: float, window: tuple[int, int], softcap: float, dropout_p: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse)."""
    d = Operands(
        q, k, v, sinks, attn_mask, alibi_slopes, seed, scale, window, softcap, dropout_p,
        deterministic=deterministic,
    )  # fmt: skip
    if cu_seqlens is None or cu_seqlens_k is None:
        return _forward(d)
    if _has_libraries(q):
        packing = form.packing(cu_seqlens, cu_seqlens_k)
        library = libraries.pick(d, packing, "fwd")
        if library:
            return libraries.forward(library, d, packing)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=d.wide)
    for part, rows, _ in sequences(d, cu_seqlens, cu_seqlens_k):
        one_out, one_lse = _forward(part)
        out[rows], lse[:, rows] = one_out[0], one_lse[0]
    return out, lse


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    sinks: Tensor | None, attn_mask: Tensor | None, cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None, alibi_slopes: Tensor | None, seed: Tensor | None, scale: float,
    window: tuple[int, int], softcap: float, dropout_p: float, deterministic: bool,
    needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, sinks and attn_mask, the last two not rounded yet; None where `needs`
    does not ask."""
    d = Operands(
        q, k, v, sinks, attn_mask, alibi_slopes, seed, scale, window, softcap, dropout_p,
        deterministic=deterministic,
    )  # fmt: skip
    if cu_seqlens is None or cu_seqlens_k is None:
        return _backward(dout, dlse, d, out, lse, needs)
    if _has_libraries(q):
        packing = form.packing(cu_seqlens, cu_seqlens_k)
        library = libraries.pick(d, packing, "bwd", lse_gradient=dlse is not None)
        if library:
            return libraries.backward(library, dout, dlse, d, packing, out, lse, needs)
    grads = [torch.empty_like(t) for t in (q, k, v)]
    dsinks = sinks.new_zeros(sinks.shape, dtype=d.wide) if sinks is not None else None
    for part, rows, keys in sequences(d, cu_seqlens, cu_seqlens_k):
        one = _backward(
            dout[None, rows], None if dlse is None else dlse[None, :, rows], part,
            out[None, rows], lse[None, :, rows], needs,
        )  # fmt: skip
        for total, g, where in zip(grads, one, (rows, keys, keys), strict=False):
            if g is not None:
                total[where] = g[0]
        if dsinks is not None and one[3] is not None:
            dsinks += one[3]
    return [*grads, dsinks, None]
