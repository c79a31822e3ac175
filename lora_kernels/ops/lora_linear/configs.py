"""Tiles of the Triton kernels as data, one validity predicate, and the analytic default.

The default is a function of shape, dtype and architecture alone: no measurement, no state, the
same on every run. It has not been tuned on hardware. A tuner walks over the tables here, asks
:func:`invalid` and installs its choice with :func:`forced`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

MAX_RANK = 256
RANK_BLOCK = 32  # the rank is a k-extent: blocks of at most this many columns join the product
REGISTERS = 128  # fp32 accumulators that a thread can hold beside everything else
# Dynamic shared memory that one program can ask for, from the vendors' tables.
SHARED_BYTES = {
    "sm_80": 166912, "sm_86": 101376, "sm_87": 166912, "sm_89": 101376, "sm_90": 232448,
    "sm_100": 232448, "sm_103": 232448, "sm_120": 101376, "sm_121": 101376,
    "gfx90a": 65536, "gfx942": 65536, "gfx950": 163840,
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A device as the configurations see it. `descriptors`: it has a unit for tensor maps."""

    name: str
    processors: int
    shared_bytes: int
    descriptors: bool

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")


def target(name: str, processors: int) -> Target:
    """Target of an architecture such as ``sm_90`` or ``gfx942``."""
    digits = name.removeprefix("sm_")
    descriptors = digits.isdigit() and int(digits) >= 90
    return Target(name, processors, SHARED_BYTES.get(name, 65536), descriptors)


@dataclass(frozen=True)
class Gemm:
    """C tile `block_m` x `block_n`, `block_k` of the sum per step. See triton_gemm.py."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    descriptor: bool = False
    persistent: bool = False
    flatten: bool = False
    store_parts: int = 1
    lora_last: bool = True


@dataclass(frozen=True)
class Rows:
    """A kernel that walks over one axis in steps and keeps the other in registers.

    shrink: `held` rows of X against steps of K. dy_pass: `held` columns of dY against steps of M.
    da_pass: `held` columns of X against steps of M. `splits` programs share the walk.
    """

    held: int
    step: int
    splits: int
    num_warps: int
    num_stages: int


# The first of a list is the one for large problems. 16-bit types.
_HOPPER = (
    # The main loop runs on across tiles: the epilogue of one tile overlaps the loads of the next.
    Gemm(128, 256, 64, 8, 3, descriptor=True, persistent=True, flatten=True, store_parts=2),
    Gemm(128, 256, 64, 8, 4, descriptor=True),
    Gemm(128, 128, 64, 4, 4, descriptor=True, persistent=True, flatten=True),
    Gemm(128, 128, 64, 4, 4, descriptor=True),
    Gemm(64, 128, 64, 4, 5, descriptor=True),
    Gemm(64, 64, 64, 4, 5, descriptor=True),
    Gemm(128, 256, 64, 8, 3, descriptor=True, lora_last=False),
    Gemm(128, 128, 64, 8, 4, descriptor=True, lora_last=False),
    Gemm(64, 128, 64, 4, 5, descriptor=True, lora_last=False),
)
_POINTER = (
    Gemm(128, 128, 32, 4, 4),
    Gemm(128, 128, 64, 8, 3),
    Gemm(128, 128, 32, 8, 3, persistent=True),
    Gemm(64, 128, 32, 4, 4),
    Gemm(64, 64, 64, 4, 3),
    Gemm(128, 128, 32, 8, 4, lora_last=False),
    Gemm(64, 128, 32, 4, 4, lora_last=False),
)
_AMD = (
    Gemm(128, 128, 64, 8, 2),
    Gemm(64, 128, 64, 4, 2),
    Gemm(64, 64, 64, 4, 2),
    Gemm(128, 128, 64, 8, 2, lora_last=False),
    Gemm(64, 128, 64, 4, 2, lora_last=False),
)
_FP32 = (
    Gemm(64, 128, 32, 8, 2),
    Gemm(64, 64, 32, 8, 2),
    Gemm(64, 128, 32, 8, 2, lora_last=False),
)


def gemm_table(itemsize: int, where: Target) -> tuple[Gemm, ...]:
    """Every configuration that is kept for an element size on an architecture."""
    if itemsize == 4:
        return _FP32
    if where.amd:
        return _AMD
    return _HOPPER + _POINTER if where.descriptors else _POINTER


def rank_block(rank: int) -> int:
    """Columns of the rank per k-block of the update."""
    return 16 if rank <= 16 else RANK_BLOCK


def rank_blocks(rank: int) -> int:
    return -(-rank // rank_block(rank))


def padded_rank(rank: int) -> int:
    """The power of two, at least 16, that a tensor core works on."""
    return max(16, 1 << (rank - 1).bit_length())


def gemm_shared_bytes(c: Gemm, itemsize: int, rank: int) -> int:
    """Upper bound of what the compiler asks for: pipeline, update operands, staged result."""
    edges = c.block_m + c.block_n
    pipeline = c.num_stages * edges * c.block_k * itemsize
    update = edges * rank_block(rank) * itemsize
    staged = c.block_m * c.block_n // c.store_parts * itemsize if c.descriptor else 0
    if not c.persistent:
        return max(pipeline + update, staged) + 1024
    return pipeline + update + staged + 1024


def invalid(c: Gemm, where: Target, itemsize: int, rank: int, dropout: bool, exact: bool) -> str:
    """Why `c` cannot run, or "". `exact`: the update is scaled in fp32, not in its operand."""
    if c.descriptor and not where.descriptors:
        return f"{where.name} has no unit for tensor maps"
    if c.flatten and not (c.persistent and c.descriptor and c.lora_last):
        return "flatten needs a persistent descriptor kernel with the update last"
    if c.flatten and rank_blocks(rank) > 2:
        return f"rank {rank} needs a loop of its own, which does not flatten"
    if c.store_parts != 1 and not c.descriptor:
        return "store_parts needs a descriptor"
    if c.block_m * c.block_n > REGISTERS * 32 * c.num_warps:
        return f"a tile of {c.block_m}x{c.block_n} does not fit {c.num_warps} warps"
    if dropout and (c.lora_last or c.block_n % 128):
        return "a mask needs the update first and tiles of whole 128-column blocks"
    if dropout and c.persistent:
        return "a mask beside the state of a persistent loop spills registers"
    if exact and c.lora_last:
        return "an update that comes last is scaled in its operand"
    needed = gemm_shared_bytes(c, itemsize, rank)
    if needed > where.shared_bytes:
        return f"{needed} bytes of shared memory, {where.name} has {where.shared_bytes}"
    return ""


# Share of the tensor core that a tile of this size can feed, relative to the largest.
_EFFICIENCY = {128 * 256: 1.0, 128 * 128: 0.88, 64 * 128: 0.7, 64 * 64: 0.5}


def gemm(
    M: int, P: int, rank: int, itemsize: int, where: Target,
    *, dropout: bool = False, exact: bool = False, descriptor: bool = False, members: int = 1,
) -> Gemm:  # fmt: skip
    """Default configuration for C [M, P]; `descriptor`: the operands allow tensor maps.

    The valid configuration with the least estimated time: waves of tiles over the multiprocessors
    times the work of a tile over its efficiency. The first of equals wins.
    """
    if "gemm" in _forced:
        return _forced["gemm"]

    def estimate(c: Gemm) -> float:
        tiles = -(-M // c.block_m) * -(-P // c.block_n)
        waves = -(-tiles // where.processors)
        area = c.block_m * c.block_n
        # A launch per tile pays its start and its epilogue where a persistent one overlaps them.
        start = 1.0 if c.flatten else 1.03
        return waves * area * start / _EFFICIENCY[area]

    candidates = [
        c
        for c in gemm_table(itemsize, where)
        if c.descriptor == (descriptor and where.descriptors)
        and not (c.flatten and members > 1)
        and not invalid(c, where, itemsize, rank, dropout, exact)
    ]
    return min(candidates, key=estimate)


def members_per_launch(ranks: tuple[int, ...]) -> list[tuple[int, int]]:
    """Ranges of members whose padded ranks fit the registers of one shrink or dA kernel."""
    ranges, first = [], 0
    for last in range(1, len(ranks) + 1):
        if (
            last == len(ranks)
            or (last + 1 - first) * padded_rank(max(ranks[first : last + 1])) > MAX_RANK
        ):
            ranges.append((first, last))
            first = last
    return ranges


def _stages(bytes_per_stage: int, where: Target, most: int = 4) -> int:
    # 1 means no pipeline and no buffers: what is left for tiles that are too large for two.
    budget = where.shared_bytes // 2 if where.shared_bytes > 131072 else where.shared_bytes * 3 // 4
    for stages in range(most, 1, -1):
        if stages * bytes_per_stage <= budget:
            return stages
    return 1


def _splits(blocks: int, steps: int, most: int, where: Target) -> int:
    """Programs along the walk: two per multiprocessor in all, at least four steps for each."""
    wanted = -(-2 * where.processors // max(1, blocks))
    return max(1, min(wanted, steps // 4, most))


def shrink(M: int, K: int, total: int, itemsize: int, where: Target, dropout: bool) -> Rows:
    """`total`: padded ranks of the members of the launch, together."""
    if "shrink" in _forced:
        return _forced["shrink"]
    held = 16 if M <= 16 else 32 if total <= 16 else 64
    if total > 128 and itemsize == 4:
        held = min(held, 32)
    step = 128 if dropout or (total <= 64 and itemsize == 2) else 64
    stages = _stages((held + total) * step * itemsize, where)
    # Partial sums may cost a quarter of the pass over X.
    splits = _splits(-(-M // held), -(-K // step), max(1, K // (16 * total)), where)
    return Rows(held, step, splits, 8 if held * total > 64 * 64 else 4, stages)


def dy_pass(M: int, N: int, rank: int, itemsize: int, where: Target) -> Rows:
    if "dy_pass" in _forced:
        return _forced["dy_pass"]
    padded = padded_rank(rank)
    held = max(64, min(256, 128 * 64 // padded)) // (2 if itemsize == 4 else 1)
    step = 32 if where.amd or itemsize == 4 else 64
    stages = _stages(step * (held + padded) * itemsize, where, 3)
    splits = _splits(-(-N // held), -(-M // step), max(1, M // (16 * rank)), where)
    return Rows(held, step, splits, 8, stages)


def da_pass(M: int, K: int, total: int, itemsize: int, where: Target) -> Rows:
    if "da_pass" in _forced:
        return _forced["da_pass"]
    held = 128
    step = 32 if where.amd or itemsize == 4 or total > 64 else 64
    stages = _stages(step * (held + total) * itemsize, where, 3)
    splits = _splits(-(-K // held), -(-M // step), max(1, M // (16 * total)), where)
    return Rows(held, step, splits, 8 if total > 32 else 4, stages)


_forced: dict[str, Any] = {}


@contextmanager
def forced(**choices: Gemm | Rows) -> Iterator[None]:
    """Inside, `gemm`, `shrink`, `dy_pass` or `da_pass` is the given one: for tuners and tests."""
    before = dict(_forced)
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def with_splits(c: Rows, splits: int) -> Rows:
    return replace(c, splits=splits)
