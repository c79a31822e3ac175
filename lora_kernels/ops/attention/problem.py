"""The problem description that predicates, `explain`, benchmarks and tests share."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops import _dispatch, _evidence, _shapes
from lora_kernels.ops.attention import capabilities

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("reference", "aten", "cpu", "triton", "cuda")
CACHE_BACKENDS = ("reference", "aten", "cpu", "triton")  # of attention_decode
MASKS = ("", "bool", "additive")
CACHES = ("", "contiguous", "paged")
OP = "attention"


@dataclass(frozen=True)
class AttentionProblem:
    """q [B, S, H, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv]; for `varlen`, B sequences of at most S.

    `window` is (left, right) with causal folded in: right = 0. -1: unlimited. `cache`: k and v are
    a cache of capacity Sk, contiguous or paged, for attention_decode. Not `deterministic`: a
    library's kernel may add in any order.
    """

    B: int
    S: int
    H: int
    D: int
    Sk: int
    Hk: int
    Dv: int
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: bool = False
    mask: str = ""
    alibi: bool = False
    varlen: bool = False
    dropout_p: float = 0.0
    mask_gradient: bool = False
    lse_gradient: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    cache: str = ""
    deterministic: bool = True

    @classmethod
    def from_shapes(cls, **shapes: Any) -> AttentionProblem:
        """From keywords for `lk.explain`: B, S, H, D, where they differ Sk, Hk, Dv; `causal`."""
        _shapes.check_names(cls, shapes, ("B", "S", "H", "D"), ("causal",))
        for name, twin in (("Sk", "S"), ("Hk", "H"), ("Dv", "D")):
            shapes.setdefault(name, shapes[twin])
        if shapes.setdefault("mask", "") not in MASKS:
            raise InvalidArgumentError(f"mask={shapes['mask']!r}; accepted: {MASKS}")
        if shapes.setdefault("cache", "") not in CACHES:
            raise InvalidArgumentError(f"cache={shapes['cache']!r}; accepted: {CACHES}")
        shapes["softcap"] = shapes.get("softcap") or 0.0
        window: Any = shapes.get("window") or (-1, -1)
        shapes["window"] = (window[0], 0 if shapes.pop("causal", False) else window[1])
        _shapes.read_dtype(shapes, DTYPES)
        return cls(**shapes)

    def evidence_key(self) -> _evidence.Key:
        """A measurement speaks for its own size of heads alone."""
        return _evidence.fields_key(self, exact=("D", "Dv"))

    def reach(self) -> tuple[int, int]:
        """The window, a side that excludes no key written as -1."""
        left, right = self.window
        return (
            -1 if left >= self.Sk - 1 else left,
            -1 if right >= self.S - 1 else right,
        )

    def features(self) -> frozenset[str]:
        """What is not plain about it, in the words of capabilities.FEATURES."""
        left, right = self.reach()
        causal = (left, right) == (-1, 0)
        windowed = (left, right) != (-1, -1) and not causal
        used = {
            "causal": causal and self.Sk == self.S,
            "causal_unequal": causal and self.Sk != self.S,
            "gqa": self.Hk != self.H,
            "value_dim": self.Dv != self.D,
            "varlen": self.varlen,
            "window": windowed,
            "softcap": self.softcap != 0.0,
            "sinks": self.sinks,
            "alibi": self.alibi,
            "bool_mask": self.mask == "bool",
            "additive_mask": self.mask == "additive",
            "masked_causal": causal and self.mask != "",
            "mask_gradient": self.mask_gradient,
            "dropout": self.dropout_p != 0.0,
            "lse_gradient": self.lse_gradient,
            "empty": 0 in (self.B, self.S, self.Sk),
            "head_dim": self.D not in (64, 128),
            "float64": self.dtype == torch.float64,
            "float32": self.dtype == torch.float32,
            "float16": self.dtype == torch.float16,
            "bfloat16": self.dtype == torch.bfloat16,
            "gpu": self.device != "cpu",
        }
        return frozenset(name for name, there in used.items() if there)

    def visible(self) -> int:
        """Pairs of a query and a key that it sees, in one head of one sequence."""
        left, right = self.reach()
        total, offset = 0, self.Sk - self.S
        for i in range(offset, self.Sk):
            low = 0 if left < 0 else max(0, i - left)
            high = self.Sk if right < 0 else min(self.Sk, i + right + 1)
            total += max(0, high - low)
        return total


def supports(backend: str, problem: AttentionProblem) -> tuple[bool, str]:
    """Can this backend run this problem; the reason is for people."""
    if problem.cache and backend not in CACHE_BACKENDS:
        return False, f"{OP} has no {backend} kernels for a cache"
    if problem.cache and backend == "aten":
        return True, _cache_in_aten(problem)
    if backend == "reference":
        return True, "plain PyTorch, all scores at once"
    if backend == "aten" and problem.device == "cpu":
        return True, capabilities.aten_path(problem.features())[1]
    if backend == "aten":
        from lora_kernels.ops.attention import libraries

        return libraries.explain(problem)
    if problem.cache and backend == "cpu":
        from lora_kernels.ops.attention import decode_cpu

        return decode_cpu.supports(problem)
    if backend in BACKENDS:
        return importlib.import_module(f"lora_kernels.ops.{OP}.{backend}").supports(problem)
    return False, f"{OP} has no {backend} kernels"


def _cache_in_aten(problem: AttentionProblem) -> str:
    if problem.device == "cpu":
        return "the cache as a batch, masked"
    from lora_kernels.ops.attention.libraries import decode

    library, why = decode.choose(problem)
    where_it_lies = "on a cache whose rows and pages it can read: "
    return where_it_lies + why if library else f"the cache as a batch, masked; {why}"


def choose(
    problem: AttentionProblem, requested: str | None = None, direction: str = "fwd"
) -> tuple[str, str]:
    """(backend, reason) that would run `problem` in one direction, ``fwd`` or ``bwd``."""
    name = _dispatch.requested_backend(requested)
    if name == "auto" and problem.device != "cpu":
        return _evidence.choose(OP, BACKENDS, problem, direction, supports)

    def answer(backend: str) -> tuple[bool, str]:
        if backend == "cpu" and name == "auto":
            from lora_kernels.ops.attention import cpu, decode_cpu

            return (decode_cpu if problem.cache else cpu).outruns_aten(problem)
        return supports(backend, problem)

    return _dispatch.resolve(OP, name, ("cpu", "aten"), answer)


def launcher(problem: AttentionProblem, requested: str, direction: str) -> ModuleType:
    name, _ = choose(problem, requested, direction)
    return importlib.import_module(f"lora_kernels.ops.{OP}.{name}")


def flops(problem: AttentionProblem, direction: str) -> float:
    """Multiply-adds count two, over the pairs that are visible. `bwd` makes the scores again."""
    pairs = 2.0 * problem.B * problem.H * problem.visible()
    if direction == "fwd":
        return pairs * (problem.D + problem.Dv)
    return pairs * (3 * problem.D + 2 * problem.Dv)


def min_bytes(problem: AttentionProblem, direction: str) -> float:
    """Every operand read once, every result written once; no scores."""
    p = problem
    q, out = p.B * p.S * p.H * p.D, p.B * p.S * p.H * p.Dv
    kv = p.B * p.Sk * p.Hk * (p.D + p.Dv)
    lse = 4 * p.B * p.H * p.S
    fwd = p.dtype.itemsize * (q + kv + out) + lse
    return float(fwd if direction == "fwd" else fwd + p.dtype.itemsize * (q + kv + out))
