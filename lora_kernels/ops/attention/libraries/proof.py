"""A library's kernel against the formula in fp64, on this GPU, before it is first used for a kind
of problem.

What such a kernel computes others have proven; what is checked here is that our arguments mean
there what they mean here: alignment of masks, sides of windows, layout and base of the
log-sum-exp, rows that see nothing. Some 150 queries and keys with the same heads are computed, once
per process, device, direction and kind of problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.attention.libraries import form
from lora_kernels.ops.attention.operands import Operands
from lora_kernels.ops.attention.problem import AttentionProblem

# Largest error, as a share of the largest element: several roundings to the dtype. An argument that
# is taken otherwise errs by about 1.
ALLOWED = {torch.bfloat16: 2.0**-4, torch.float16: 2.0**-6, torch.float32: 2.0**-15}
_ROWS, _FEWER, _MORE = 143, 61, 189
_LENGTHS, _KEY_LENGTHS = (70, 0, 1, 131, 9), (97, 5, 40, 131, 0)
_LEFT, _AHEAD, _SOFTCAP = 31, 17, 3.0
_known: dict[tuple[Any, ...], str] = {}


def failure(library: str, problem: AttentionProblem, direction: str, device: str) -> str:
    """Why `library` is not to be used for problems of this kind; empty where it is proven."""
    left, right = problem.reach()
    key = (
        library, device, direction, problem.D, problem.Dv, problem.Hk != problem.H,
        problem.Sk == problem.S, left >= 0, (right > 0) - (right < 0), problem.softcap != 0.0,
        problem.sinks, problem.mask, problem.alibi, problem.varlen, problem.lse_gradient,
        problem.dtype, problem.deterministic,
    )  # fmt: skip
    return once(key, lambda: _failure(library, problem, direction, device))


def once(key: tuple[Any, ...], check: Callable[[], str]) -> str:
    """What `check` said when it was first made for this key; an error of its is a reason too."""
    if key not in _known:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "not checked yet on this device, and a graph is being captured"
        try:
            with torch.no_grad():
                _known[key] = check()
        except Exception as error:  # whatever another project's code may raise
            text = " ".join(str(error).split())[:160]
            _known[key] = f"failed its check on this device: {type(error).__name__}: {text}"
    return _known[key]


def forget() -> None:
    _known.clear()


def _failure(library: str, problem: AttentionProblem, direction: str, device: str) -> str:
    for d, ends in _examples(problem, device):
        wrong = _compare(library, d, ends, direction, problem.lse_gradient)
        if wrong:
            return f"failed its check against fp64 on this device: {wrong}"
    return ""


def _examples(
    p: AttentionProblem, device: str
) -> Iterator[tuple[Operands, tuple[Tensor, Tensor] | None]]:
    """Operands of the same kind, with fewer and with more keys than queries where that tells."""
    generator = torch.Generator().manual_seed(0)
    left, right = p.reach()
    heads, groups = (4, 2) if p.Hk != p.H else (2, 2)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(device, p.dtype)

    own = p.Sk == p.S and (left, right) in ((-1, -1), (-1, 0))
    for keys in (_ROWS,) if own or p.varlen else (_FEWER, _MORE):
        rows: tuple[int, ...] = (2, _ROWS)
        extents: tuple[int, ...] = (2, keys)
        batch, packed = 2, None
        if p.varlen:
            rows, extents, batch = (sum(_LENGTHS),), (sum(_KEY_LENGTHS),), len(_LENGTHS)
            packed = _ends(_LENGTHS, device), _ends(_KEY_LENGTHS, device)
        mask = None
        if p.mask:
            shown = torch.rand(2, 1, _ROWS, keys, generator=generator) < 0.6
            shown &= torch.rand(2, 1, _ROWS, 1, generator=generator) < 0.9
            mask = shown.to(device)
            if p.mask == "additive":
                mask = normal(2, 1, _ROWS, keys).masked_fill(~mask, -torch.inf)
        yield (
            Operands(
                q=normal(*rows, heads, p.D, std=1.5), k=normal(*extents, groups, p.D),
                v=normal(*extents, groups, p.Dv),
                sinks=normal(heads) + 1.0 if p.sinks else None, mask=mask,
                slopes=torch.rand(batch, heads, generator=generator).to(device) / 4 if p.alibi
                else None,
                seed=None, scale=p.D**-0.5,
                window=(_LEFT if left >= 0 else -1, min(right, _AHEAD)),
                softcap=_SOFTCAP if p.softcap else 0.0, dropout_p=0.0,
                deterministic=p.deterministic,
            ),
            packed,
        )  # fmt: skip


def _ends(lengths: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def _compare(
    library: str, d: Operands, ends: tuple[Tensor, Tensor] | None, direction: str, of_lse: bool
) -> str:
    """What is off and by how much; empty where nothing is."""
    from lora_kernels.ops.attention import libraries, reference

    exact = [None if t is None else t.double() for t in (d.q, d.k, d.v, d.sinks)]
    mask = d.mask if d.mask is None or d.mask.dtype == torch.bool else d.mask.double()
    cu, cu_k = ends or (None, None)
    p = None if ends is None else form.packing(*ends)
    rest: Any = (mask, cu, cu_k, d.slopes, None, d.scale, d.window, d.softcap, 0.0, True)
    q, k, v, sinks = exact
    assert q is not None and k is not None and v is not None
    out, lse = reference.attention_fwd(q, k, v, sinks, *rest)
    if direction == "fwd":
        named = {"out": out, "lse": lse}
        got = dict(zip(named, libraries.forward(library, d, p), strict=True))
    else:
        generator = torch.Generator().manual_seed(1)
        dout = torch.randn(out.shape, generator=generator).to(d.q)
        dlse = torch.randn(lse.shape, generator=generator).to(lse) if of_lse else None
        if dlse is not None:
            dlse = dlse.masked_fill(lse == -torch.inf, 0.0)
        needs = [True, True, True, False, False]
        every: Any = (dout.double(), dlse, out, lse, q, k, v, sinks, *rest, needs)
        grads = reference.attention_bwd(*every)
        named = {n: g for n, g in zip(("dq", "dk", "dv"), grads, strict=False) if g is not None}
        made = libraries.backward(
            library, dout, None if dlse is None else dlse.float(), d, p, out.to(d.q.dtype),
            lse.float(), needs,
        )  # fmt: skip
        got = {n: g for n, g in zip(named, made, strict=False) if g is not None}
    for name, want in named.items():
        wrong = off(name, got[name].double(), want, ALLOWED[d.q.dtype])
        if wrong:
            return wrong
    return ""


def off(name: str, got: Tensor, want: Tensor, allowed: float) -> str:
    """How far `got` is from `want`; empty where it is near enough."""
    nothing = want == -torch.inf
    if not torch.equal(got == -torch.inf, nothing):
        return f"{name} is -inf elsewhere"
    got, want = got.masked_fill(nothing, 0.0), want.masked_fill(nothing, 0.0)
    share = ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
    return "" if share <= allowed else f"{name} is off by {share:.3g} of its largest element"
