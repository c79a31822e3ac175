"""Library kernels that `aten` calls on a GPU: which one, why not another, and the call.

A kernel is taken where its table and limits cover the whole problem and its check on this device
passed. LORA_KERNELS_ATEN_ATTENTION names one of table.COLUMNS, which then runs or raises, or
`blocks`, which leaves all of them out.
"""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from lora_kernels.errors import BackendUnavailableError, InvalidArgumentError
from lora_kernels.ops.attention.libraries import form, here, proof, table
from lora_kernels.ops.attention.operands import Operands, row_gradient, sink_gradient
from lora_kernels.ops.attention.problem import AttentionProblem

VARIABLE = "LORA_KERNELS_ATEN_ATTENTION"
BLOCKS = "blocks"
_MOST = 65535  # batch and heads: axes of a launch
_NONE: frozenset[str] = frozenset()
_BLOCKS = "blocks of queries x keys with an online softmax"


def requested() -> str:
    name = os.environ.get(VARIABLE, "") or "auto"
    accepted = ("auto", BLOCKS, *table.COLUMNS)
    if name not in accepted:
        raise InvalidArgumentError(
            f"{VARIABLE}={name!r} is unknown; accepted: {', '.join(accepted)}"
        )
    return name


@functools.cache
def module(library: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{library.replace('-', '_')}")


def choose(
    problem: AttentionProblem, direction: str, particular: frozenset[str] = _NONE
) -> tuple[str | None, str]:
    """(library or None, reason) for a problem on the current GPU, in one direction.

    None: blocks, or for packed sequences one by one, each chosen for itself. `particular` holds
    what only the tensors tell (form.particular).

    Raises:
        BackendUnavailableError: LORA_KERNELS_ATEN_ATTENTION names a library that cannot run it.
    """
    name = requested()
    if name == BLOCKS:
        return None, f"blocks, by {VARIABLE}"
    if "empty" in problem.features():
        return None, "nothing to compute: no kernel is started"
    passed_over: list[str] = []
    for library in table.ORDER if name == "auto" else (name,):
        why = lacking(library, problem, direction, particular)
        if not why:
            return library, "; ".join([table.TITLES[library], *passed_over])
        passed_over.append(f"{library}: {why}")
    if name != "auto" and not (problem.varlen and name not in table.PACKED):
        raise BackendUnavailableError(
            f"attention: {VARIABLE}={name!r} cannot run this problem: {passed_over[0]}"
        )
    return None, "; ".join(passed_over)


def lacking(
    library: str, problem: AttentionProblem, direction: str, particular: frozenset[str] = _NONE
) -> str:
    """Why `library` is not taken; empty where it is."""
    where = here.device()
    why = static(library, problem, direction, particular, where)
    if why or where is None:
        return why
    return proof.failure(library, problem, direction, where.name)


@functools.lru_cache(maxsize=4096)
def static(
    library: str, problem: AttentionProblem, direction: str, particular: frozenset[str],
    where: here.Device | None,
) -> str:  # fmt: skip
    """Why `library` cannot run it, as far as that is known without running anything."""
    features = problem.features() | particular
    if problem.deterministic:
        features |= {"deterministic"}
    if direction == "fwd":  # what torch says of cuDNN's determinism is about both directions
        features -= {"lse_gradient", "mask_gradient"}
    why = table.lacking(library, features)
    if problem.varlen and library not in table.PACKED:
        why = "; ".join(filter(None, ["packed sequences are taken one by one", why]))
    if why:
        return why
    if where is None:
        return "torch sees no GPU here"
    if max(problem.B, problem.H) > _MOST:
        return f"a batch or heads beyond {_MOST}"
    return module(library).limits(problem, direction, where)


def explain(problem: AttentionProblem, direction: str = "fwd") -> tuple[bool, str]:
    """(able, reason) of `aten` on a GPU."""
    try:
        library, why = choose(problem, direction)
        if library is None and problem.varlen:
            one = replace(problem, varlen=False, B=1)
            library, why = choose(one, direction)
            why = f"one sequence after the other: {why}"
    except BackendUnavailableError as error:
        return False, str(error)
    return True, why if library else f"{_BLOCKS}: {why}"


def pick(d: Operands, p: form.Packing | None, direction: str, **gradients: bool) -> str | None:
    """The library for these operands, or None."""
    problem = d.problem(sequences=0 if p is None else p.q.shape[0] - 1, **gradients)
    with torch.cuda.device_of(d.q):
        return choose(problem, direction, form.particular(d, p))[0]


def forward(library: str, d: Operands, p: form.Packing | None) -> tuple[Tensor, Tensor]:
    """(out, lse) as the op returns them."""
    out, lse = module(library).forward(d, p)
    return form.finished(d, out, lse)


def backward(
    library: str, dout: Tensor, dlse: Tensor | None, d: Operands, p: form.Packing | None,
    out: Tensor, lse: Tensor, needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and sinks, as `aten` returns them."""
    grads: list[Tensor | None] = [None, None, None]
    if any(needs[:3]):
        made = module(library).backward(dout, dlse, d, p, out, lse)
        sizes = (d.q.shape[-1], d.k.shape[-1], d.v.shape[-1])
        grads = [g[..., :size] for g, size in zip(made, sizes, strict=True)]
    dsinks = None
    if needs[3] and d.sinks is not None:
        if p is not None:
            dout, out, lse = dout.unsqueeze(0), out.unsqueeze(0), lse.unsqueeze(0)
            dlse = None if dlse is None else dlse.unsqueeze(0)
        dsinks = sink_gradient(d.sinks, lse, row_gradient(dout, out, dlse, d.wide))
    return [*grads, dsinks, None]
