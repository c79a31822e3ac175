"""What a row of gpu-check is, and how one is checked and timed.

A provider is a backend of the op or another project's kernel (a peer). Each is held to the error
budget on the device, by the op's own oracle in fp64, before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.peers import UnavailableError
from benchmarks.timing import Timed, Timing, measure
from lora_kernels.ops import _evidence, _registry
from lora_kernels.testing import BudgetExceededError, moved

FLOOR = "aten"
GPU_BACKENDS = ("triton", "cuda")
Keywords = dict[str, Any]
Judge = Callable[[dict[str, Tensor], str], object]


@dataclass(frozen=True)
class Work:
    """One provider on one problem. `forward` gives named results; `leaves` are differentiated,
    with `upstream` as gradients of the results (those that are not named there get none)."""

    forward: Callable[[], dict[str, Tensor]]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    upstream: dict[str, Tensor] = field(default_factory=dict)

    def _outs(self, made: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(made[name] for name in self.upstream)

    def _grad(self, outs: tuple[Tensor, ...], keep: bool) -> tuple[Tensor, ...]:
        leaves, upstream = tuple(self.leaves.values()), tuple(self.upstream.values())
        return torch.autograd.grad(outs, leaves, upstream, retain_graph=keep)

    def fwd(self) -> object:
        return self.forward()

    def fwdbwd(self) -> object:
        return self._grad(self._outs(self.forward()), False)

    @cached_property
    def _kept(self) -> tuple[Tensor, ...]:
        return self._outs(self.forward())

    def bwd(self) -> object:
        """The backward alone, of one forward that is kept."""
        return self._grad(self._kept, True)

    def results(self) -> dict[str, Tensor]:
        """Every result and, named d..., every gradient."""
        made = self.forward()
        grads = self._grad(self._outs(made), False) if self.leaves else ()
        named = {f"d{n}": g for n, g in zip(self.leaves, grads, strict=True)}
        return {**{n: t.detach() for n, t in made.items()}, **named}


@dataclass(frozen=True)
class GpuOp:
    """One row.

    small: keywords of `inputs` for tests on the device and the sanitizer: edges and odd sizes.
    cases: label -> keywords, problems to time, what is missed most first.
    inputs(**keywords): an op's inputs (lora_kernels.testing), on the CPU.
    judge(inputs): the check of one problem: given results by name it raises BudgetExceededError.
    work(inputs, provider): a backend or a peer on these inputs; UnavailableError says why not.
    problem(inputs): keywords of the registry's problem as the op makes it, device apart.
    counted(inputs): problems whose flops and bytes add up to those of the inputs; by default that
        one.
    gate(keywords): the problem that stands for a case in the check, where the oracle of the case
        itself would not fit; a case by default.
    """

    name: str
    small: tuple[Keywords, ...]
    cases: dict[str, Keywords]
    inputs: Callable[..., Any]
    judge: Callable[[Any], Judge]
    work: Callable[[Any, str], Work]
    problem: Callable[[Any], Keywords]
    peers: tuple[str, ...] = ()
    counted: Callable[[Any], tuple[Keywords, ...]] | None = None
    gate: Callable[[Keywords], Keywords] = lambda keywords: keywords
    modes: tuple[str, ...] = gpu.MODES
    backends: tuple[str, ...] = ()  # default: those of the registry

    def gpu_backends(self) -> tuple[str, ...]:
        own = self.backends or _registry.find(self.name).backends
        return tuple(b for b in GPU_BACKENDS if b in own)

    def providers(self) -> tuple[str, ...]:
        return (FLOOR, *self.gpu_backends(), *self.peers)

    def able(self, inputs: Any, backend: str, device: str) -> tuple[bool, str]:
        spec = _registry.find(self.name)
        return spec.supports(backend, spec.problem(**self.problem(inputs), device=device))

    def check(self, keywords: Keywords, backend: str, device: str = "cuda") -> None:
        """One small problem on a backend; UnavailableError where it cannot run it."""
        inputs = moved(self.inputs(**keywords), device)
        can, why = self.able(inputs, backend, device)
        if not can:
            raise UnavailableError(why)
        self.judge(inputs)(self.work(inputs, backend).results(), backend)

    def count(self) -> int:
        return len(self.cases)

    def bench(self, number: int, names: tuple[str, ...], run: Run) -> Iterator[dict[str, Any]]:
        """Rows of one case, by mode and provider."""
        label, keywords = list(self.cases.items())[number]
        yield from Timer(self, label, keywords, run).rows(names)


@dataclass(frozen=True)
class Run:
    """Settings of one run: where, against what, with which clock and how long."""

    top: dict[str, float]
    timed: Timed
    rounds: int
    device: str = "cuda"
    modes: tuple[str, ...] = gpu.MODES
    count: tuple[str, ...] = gpu.MODES
    announce: Callable[[dict[str, Any] | None], None] = lambda row: None


class Timer:
    """One case of one op."""

    def __init__(self, op: GpuOp, label: str, keywords: Keywords, run: Run) -> None:
        self.op, self.label, self.run = op, label, run
        self.small = op.gate(keywords)
        self.inputs = moved(op.inputs(**keywords), run.device)
        spec = _registry.find(op.name)
        self.problem = spec.problem(**op.problem(self.inputs), device=run.device)
        self.spec = spec
        self.counted = [self.problem]
        if op.counted is not None:
            every = op.counted(self.inputs)
            self.counted = [spec.problem(**k, device=run.device) for k in every]
        self.key = _evidence.key_of(self.problem)
        self._judge: tuple[Any, Judge] | None = None

    def row(
        self, mode: str, name: str, timing: Timing | None, skipped: str | None, used: dict[str, Any]
    ) -> dict[str, Any]:
        made = {
            "op": self.op.name, "case": self.label, "sizes": dict(self.key.sizes),
            "kind": dict(self.key.kind), "mode": mode, "provider": name, "skipped": skipped,
        }  # fmt: skip
        if timing is None:
            return made
        directions = ("fwd", "bwd") if mode == "fwdbwd" else (mode,)
        flops = sum(self.spec.flops(p, d) for p in self.counted for d in directions)
        traffic = sum(self.spec.min_bytes(p, d) for p in self.counted for d in directions)
        return made | gpu.figures(timing, flops, traffic, self.run.top) | used

    def check(self, name: str) -> None:
        """Against the oracle, on the case or on what stands for it."""
        if self._judge is None:
            inputs = moved(self.op.inputs(**self.small), self.run.device)
            self._judge = inputs, self.op.judge(inputs)
        inputs, judge = self._judge
        judge(self.op.work(inputs, name).results(), name)

    def usable(self, names: tuple[str, ...]) -> tuple[dict[str, Work], dict[str, str]]:
        passed, reasons = {}, {}
        for name in names:
            self.run.announce(self.row("fwd", name, None, None, {}))
            try:
                if name in (FLOOR, *GPU_BACKENDS):
                    can, why = self.spec.supports(name, self.problem)
                    if not can:
                        raise UnavailableError(why)
                self.check(name)
                passed[name] = self.op.work(self.inputs, name)
            except UnavailableError as error:
                reasons[name] = str(error)
            except BudgetExceededError as error:
                reasons[name] = f"WRONG: {error}"
            except Exception as error:  # also what another project's code may raise
                reasons[name] = gpu.failure(error)
                gpu.still_there(name)
        self.run.announce(None)
        return passed, reasons

    def rows(self, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        passed, reasons = self.usable(names)
        for mode in (m for m in self.op.modes if m in self.run.modes):
            works, used, failed = {}, {}, dict(reasons)
            for name, work in passed.items():
                call = getattr(work, mode)
                if mode != "fwd" and not work.leaves:
                    failed[name] = "it has no gradient here"
                    continue
                try:
                    call()
                    counted = mode in self.run.count
                    used[name] = {
                        "launches": gpu.launches(call) if counted else None,
                        "peak_bytes": gpu.peak_bytes(call) if counted else None,
                    }
                    works[name] = call
                except Exception as error:  # also what another project's code may raise
                    failed[name] = gpu.failure(error)
                    gpu.still_there(name)
            timings = {}
            if FLOOR in works:
                timings = measure(
                    works, FLOOR, rounds=self.run.rounds, round_seconds=0.008, timed=self.run.timed
                )
            for name in names:
                why = failed.get(name)
                if name not in timings and why is None:
                    why = f"{FLOOR}, which the others are compared with, did not run"
                yield self.row(mode, name, timings.get(name), why, used.get(name, {}))
