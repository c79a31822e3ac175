"""Two ops that share S: does the one that makes x make S = x A^T with it, or the layers behind?

    norm_shrink        rms_norm, then grouped_lora_linear (q/k/v, gate/up)
    activation_shrink  an MLP: forward, S of down made in gated_activation; backward, dS and dB of
                       gate and up made in its gradient

A pair is measured, judged and explained as an op is (make gpu-check, benchmarks.tune, `explain`).
`aten` stands for each op by itself, on what `auto` takes for it; another backend for the first op
on that backend, with the products. So the tables of the ops come before those of the pairs, and
what `auto` took then is part of the key: another choice is another measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lora_kernels.ops import _dispatch, _evidence, _shapes
from lora_kernels.ops._spec import OpSpec
from lora_kernels.ops.gated_activation import problem as gated_activation
from lora_kernels.ops.lora_linear import problem as lora_linear
from lora_kernels.ops.rms_norm import problem as rms_norm

BACKENDS = ("aten", "triton", "cuda")
NORM, ACTIVATION = "norm_shrink", "activation_shrink"
DIRECTIONS = {NORM: ("fwd", "fwdbwd"), ACTIVATION: ("fwd", "bwd")}


@dataclass(frozen=True)
class ShrinkPair:
    """x [M, K] and layers of N columns and adapters of `rank`: those behind the norm; or gate and
    up, or up alone, and down last. `alone`, `layers`: what `auto` takes for the two ops."""

    M: int
    K: int
    N: tuple[int, ...]
    rank: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    activation: str = ""
    device: str = "cpu"
    device_index: int = 0
    direction: str = "fwd"
    alone: str = "aten"
    layers: str = "aten"

    def evidence_key(self) -> _evidence.Key:
        return _evidence.Key(
            sizes={"M": self.M, "K": self.K, "N": sum(self.N), "rank": sum(self.rank)},
            kind={
                "members": len(self.N),
                "dtype": _evidence.name_of(self.dtype),
                "adapter_dtype": _evidence.name_of(self.adapter_dtype or self.dtype),
                "activation": self.activation,
                "alone": self.alone,
                "layers": self.layers,
            },
        )

    @property
    def forward(self) -> Any:
        """The first op's problem, with the products that it makes."""
        if not self.activation:
            return rms_norm.RmsNormProblem(
                self.M, self.K, sum(self.rank), self.dtype, self.dtype, self.device
            )
        return gated_activation.GatedActivationProblem(
            self.M, self.N[0], self.activation, len(self.N) > 2, self.dtype, self.device,
            rank=self.rank[-1], adapter_dtype=self.adapter_dtype or self.dtype,
            device_index=self.device_index,
        )  # fmt: skip

    def linear(self, K: int, N: tuple[int, ...], rank: tuple[int, ...]) -> Any:
        return lora_linear.LoraLinearProblem(
            self.M, K, N, rank, self.dtype, self.dtype, self.device,
            adapter_dtype=self.adapter_dtype or self.dtype, device_index=self.device_index,
        )  # fmt: skip


def from_shapes(pair: str, **shapes: Any) -> ShrinkPair:
    """From keywords for `lk.explain`: M, K, N and rank (tuples), and where they differ the rest."""
    _shapes.check_names(ShrinkPair, shapes, ("M", "K", "N"))
    n = shapes["N"] = shapes["N"] if isinstance(shapes["N"], tuple) else (shapes["N"],)
    rank = shapes.get("rank", 16)
    shapes["rank"] = rank if isinstance(rank, tuple) else (rank,) * len(n)
    _shapes.read_dtype(shapes, lora_linear.DTYPES)
    if shapes.get("adapter_dtype") is not None:
        _shapes.read_dtype(shapes, lora_linear.DTYPES, "adapter_dtype")
    if pair == ACTIVATION:
        shapes.setdefault("activation", "silu")
    p = ShrinkPair(**shapes)
    if {"alone", "layers"} <= set(shapes) or p.device == "cpu":
        return p
    if pair == NORM:
        alone = rms_norm.RmsNormProblem(p.M, p.K, 0, p.dtype, p.dtype, p.device)
        taken = [rms_norm.choose(alone, "auto", d)[0] for d in ("fwd", "bwd")]
        layers = [p.linear(p.K, p.N, p.rank)]
    else:
        plain = gated_activation.GatedActivationProblem(
            p.M, p.N[0], p.activation, len(p.N) > 2, p.dtype, p.device, device_index=p.device_index
        )
        taken = [gated_activation.choose(plain, "auto", d)[0] for d in ("fwd", "bwd")]
        layers = [p.linear(p.K, p.N[:-1], p.rank[:-1]), p.linear(p.N[0], p.N[-1:], p.rank[-1:])]
    behind = [lora_linear.choose_for(q, "auto", d)[0] for q in layers for d in ("fwd", "bwd")]
    return ShrinkPair(**{**shapes, "alone": "/".join(taken), "layers": "/".join(behind)})


def supports(backend: str, problem: ShrinkPair) -> tuple[bool, str]:
    """Can the first op's kernels make S on the way; the reason is for people."""
    if backend == "aten":
        return True, "each op by itself"
    if backend not in BACKENDS:
        return False, f"no pair runs on {backend}"
    op = gated_activation if problem.activation else rms_norm
    answer: tuple[bool, str] = op.supports(backend, problem.forward)
    return answer


def choose(pair: str, problem: ShrinkPair, requested: str | None = None) -> tuple[str, str]:
    """(backend that makes S with x, reason); ``aten``: the layers make it."""
    name = _dispatch.requested_backend(requested)
    if name not in ("auto", "aten"):
        return _dispatch.resolve(pair, name, (), lambda b: supports(b, problem))
    if name == "aten" or problem.device == "cpu":
        where = "on a CPU they were measured to be quicker so" if name == "auto" else "requested"
        return "aten", f"each op by itself: {where}"
    return _evidence.choose(pair, BACKENDS, problem, problem.direction, supports)


def flops(problem: ShrinkPair, direction: str) -> float:
    """Of the layers; the producer's are nothing beside them."""
    p = problem
    base = sum(2.0 * p.M * p.K * n for n in p.N)
    lora = sum(2.0 * p.M * r * (p.K + n) for n, r in zip(p.N, p.rank, strict=True))
    return base + (lora if direction == "fwd" else 2.0 * lora)


def min_bytes(problem: ShrinkPair, direction: str) -> float:
    """Every operand read once, every result written once: the producer's, then the layers'."""
    p, e = problem, problem.dtype.itemsize
    n, r = sum(p.N), sum(p.rank)
    fwd = e * (3.0 * p.M * p.K + n * p.K + r * (p.K + n) + p.M * (n + r))
    return fwd if direction == "fwd" else fwd + e * (2.0 * p.M * p.K + r * (p.K + n))


def _spec(pair: str) -> OpSpec:
    return OpSpec(
        name=pair,
        backends=BACKENDS,
        schemas=(),
        problem=partial(from_shapes, pair),
        supports=supports,
        choose=partial(choose, pair),
        flops=flops,
        min_bytes=min_bytes,
        deterministic="as its ops",
    )


PAIRS = (_spec(NORM), _spec(ACTIVATION))
