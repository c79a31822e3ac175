"""Tiles of the Triton kernels as data, one validity predicate, and the analytic default.

The default is a function of shape, dtype and architecture alone: no measurement, no state, the
same on every run. Where the tuner measured a quicker tile on such a device (tuned_tiles.py), that
one is taken. The tuner walks over the tables here, asks :func:`invalid` and tries a tile with
:func:`forced`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops.lora_linear import tuned_tiles

MAX_RANK = 256
RANK_BLOCK = 32  # the rank is a k-extent: blocks of at most this many columns join the product
REGISTERS = 128  # fp32 accumulators that a thread can hold beside everything else
# Dynamic shared memory that one program can ask for, from the vendors' tables.
SHARED_BYTES = {
    "sm_80": 166912, "sm_86": 101376, "sm_87": 166912, "sm_89": 101376, "sm_90": 232448,
    "sm_100": 232448, "sm_103": 232448, "sm_120": 101376, "sm_121": 101376,
    "gfx90a": 65536, "gfx942": 65536, "gfx950": 163840,
}  # fmt: skip
_TENSOR_MAPS = ("sm_90", "sm_100", "sm_103")


@dataclass(frozen=True)
class Target:
    """A device as the configurations see it. `descriptors`: it has a unit for tensor maps, and
    shared memory for a matrix unit that reads its operands there."""

    name: str
    processors: int
    shared_bytes: int
    descriptors: bool

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")


def target(name: str, processors: int) -> Target:
    """Target of an architecture such as ``sm_90`` or ``gfx942``."""
    return Target(name, processors, SHARED_BYTES.get(name, 65536), name in _TENSOR_MAPS)


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
    Gemm(128, 128, 64, 8, 4, descriptor=True),
    Gemm(64, 128, 64, 4, 5, descriptor=True),
    Gemm(64, 64, 64, 4, 5, descriptor=True),
    Gemm(128, 256, 64, 8, 3, descriptor=True, lora_last=False),
    Gemm(128, 128, 64, 8, 4, descriptor=True, lora_last=False),
    Gemm(64, 128, 64, 4, 5, descriptor=True, lora_last=False),
    Gemm(64, 128, 64, 8, 5, descriptor=True, lora_last=False),
)
_BLACKWELL = (
    # The accumulator is in tensor memory. Triton 3.6 cannot flatten a loop with two products there.
    Gemm(128, 256, 64, 8, 3, descriptor=True, persistent=True, store_parts=2),
    Gemm(128, 256, 64, 4, 4, descriptor=True),
    Gemm(128, 256, 64, 8, 3, descriptor=True),
    Gemm(128, 128, 64, 4, 4, descriptor=True),
    Gemm(64, 128, 64, 4, 5, descriptor=True),
    Gemm(128, 256, 64, 8, 3, descriptor=True, lora_last=False),
    Gemm(128, 128, 64, 8, 3, descriptor=True, lora_last=False),
    Gemm(64, 128, 64, 8, 4, descriptor=True, lora_last=False),
)
_POINTER = (
    Gemm(128, 128, 32, 4, 4),
    Gemm(128, 128, 32, 8, 4),
    Gemm(128, 128, 64, 8, 3),
    Gemm(128, 128, 32, 8, 3, persistent=True),
    Gemm(64, 128, 32, 4, 4),
    Gemm(64, 128, 32, 8, 4),
    Gemm(64, 64, 64, 4, 3),
    Gemm(128, 128, 32, 8, 4, lora_last=False),
    Gemm(64, 128, 32, 4, 4, lora_last=False),
    Gemm(64, 128, 32, 8, 4, lora_last=False),
    Gemm(64, 32, 64, 4, 3, lora_last=False),
)
_AMD = (
    Gemm(128, 128, 64, 8, 2),
    Gemm(64, 128, 64, 4, 2),
    Gemm(64, 64, 64, 4, 2),
    Gemm(128, 128, 64, 8, 2, lora_last=False),
    Gemm(64, 128, 64, 4, 2, lora_last=False),
    Gemm(64, 128, 64, 8, 2, lora_last=False),
)
# Multiply-add units: small tiles, as every operand of a step is in registers.
_FP32 = (
    Gemm(64, 64, 16, 8, 3),
    Gemm(64, 32, 16, 4, 3, lora_last=False),
)


def gemm_table(itemsize: int, where: Target) -> tuple[Gemm, ...]:
    """Every configuration that is kept for an element size on an architecture."""
    if itemsize == 4:
        return _FP32
    if where.amd:
        return _AMD
    tensor_maps = _HOPPER if where.name == "sm_90" else _BLACKWELL if where.descriptors else ()
    return tensor_maps + _POINTER


def rank_block(rank: int, itemsize: int) -> int:
    """Columns of the rank per k-block of the update."""
    return 16 if rank <= 16 or itemsize == 4 else RANK_BLOCK


def rank_blocks(rank: int, itemsize: int) -> int:
    return -(-rank // rank_block(rank, itemsize))


def padded_rank(rank: int) -> int:
    """The power of two, at least 16, that a tensor core works on."""
    return max(16, 1 << (rank - 1).bit_length())


def gemm_shared_bytes(c: Gemm, itemsize: int, rank: int) -> int:
    """Upper bound of what the compiler asks for: pipeline, update operands, staged result."""
    edges = c.block_m + c.block_n
    pipeline = c.num_stages * edges * c.block_k * itemsize
    update = edges * rank_block(rank, itemsize) * itemsize
    staged = c.block_m * c.block_n // c.store_parts * itemsize if c.descriptor else 0
    if not c.persistent:
        return max(pipeline + update, staged) + 1024
    return pipeline + update + staged + 1024


def invalid(
    c: Gemm, where: Target, itemsize: int, rank: int,
    *, dropout: bool = False, exact: bool = False, members: int = 1, vectors: bool = True,
) -> str:  # fmt: skip
    """Why `c` cannot run, or "". `exact`: the update is scaled in fp32, not in its operand;
    `members`: terms of the sum, more than one in dgrad of a group; `vectors`: every row of every
    operand is whole 16 bytes at an aligned address."""
    if c.descriptor and not where.descriptors:
        return f"{where.name} has no unit for tensor maps"
    if c.flatten and where.name != "sm_90":
        return f"flatten is not known to compile for {where.name}"
    if c.flatten and not (c.persistent and c.descriptor and c.lora_last):
        return "flatten needs a persistent descriptor kernel with the update last"
    if c.flatten and rank_blocks(rank, itemsize) > 2:
        return f"rank {rank} needs a loop of its own, which does not flatten"
    if c.store_parts != 1 and not c.descriptor:
        return "store_parts needs a descriptor"
    per_thread = c.block_m * c.block_n // ((64 if where.amd else 32) * c.num_warps)
    if per_thread > REGISTERS:
        return f"a tile of {c.block_m}x{c.block_n} does not fit {c.num_warps} warps"
    if dropout and (c.lora_last or (c.block_n % 128 and c.block_n not in (32, 64))):
        return "a mask needs the update first and tiles of 32, 64 or whole blocks of 128 columns"
    if dropout and c.persistent:
        return "a mask beside the state of a persistent loop spills registers"
    if rank_blocks(rank, itemsize) > 2 and per_thread > REGISTERS // 2:
        return f"the loop over rank {rank} beside a tile of this size spills registers"
    if members > 1 and (c.flatten or per_thread * (4 if dropout else 1) > REGISTERS):
        return f"{members} members in a row spill registers in a tile of this size"
    looped = rank_blocks(rank, itemsize) > 2
    if (
        members > 1
        and not c.descriptor
        and per_thread > REGISTERS // (4 if looped or members > 3 else 2)
    ):
        return f"pointers of {members} members beside a tile of this size spill registers"
    if itemsize == 4 and c.lora_last and rank_blocks(rank, itemsize) > 2:
        return f"the loop over rank {rank} beside operands in registers spills registers"
    deep = dropout and members > 1 and rank_blocks(rank, itemsize) > 2
    if deep and not c.descriptor and per_thread > REGISTERS // 8:
        return f"masks of {members} members beside rank {rank} spill registers"
    if not vectors and (c.descriptor or per_thread > REGISTERS // 4):
        return "single elements beside a tile of this size spill registers"
    if exact and c.lora_last:
        return "an update that comes last is scaled in its operand"
    needed = gemm_shared_bytes(c, itemsize, rank)
    if needed > where.shared_bytes:
        return f"{needed} bytes of shared memory, {where.name} has {where.shared_bytes}"
    return ""


def refused(where: Target, rank: int, itemsize: int, members: int, dropout: bool) -> str:
    """Why there is no tile for a problem at all, or ""."""
    if where.amd and dropout and members > 1 and rank_blocks(rank, itemsize) > 2:
        return (
            f"{where.name} has too few registers for the masks of {members} members of rank {rank}"
        )
    return ""


# Share of the tensor core that a tile of this size can feed, relative to the largest.
_EFFICIENCY = {128 * 256: 1.0, 128 * 128: 0.88, 64 * 128: 0.7, 64 * 64: 0.5, 64 * 32: 0.3}


def gemm(
    M: int, P: int, rank: int, itemsize: int, where: Target,
    *, dropout: bool = False, exact: bool = False, descriptor: bool = False, members: int = 1,
    vectors: bool = True,
) -> Gemm:  # fmt: skip
    """Default configuration for C [M, P]; `descriptor`: the operands allow tensor maps.

    The valid configuration with the least estimated time: waves of tiles over the multiprocessors
    times the work of a tile over its efficiency. The first of equals wins.
    """
    if "gemm" in _forced:
        return _forced["gemm"]
    flags: dict[str, Any] = {
        "dropout": dropout, "exact": exact, "members": members, "vectors": vectors,
    }  # fmt: skip
    table = gemm_table(itemsize, where)
    usable_maps = descriptor and any(c.descriptor for c in table)
    found = tuned_tiles.lookup(
        "gemm", where.name, M, P=P, rank=padded_rank(rank), itemsize=itemsize, dropout=dropout,
        exact=exact, descriptor=usable_maps, members=members,
    )  # fmt: skip
    if found is not None:
        tuned = Gemm(**found)
        why = invalid(tuned, where, itemsize, rank, **flags)
        if not why:
            return tuned

    def estimate(c: Gemm) -> float:
        tiles = -(-M // c.block_m) * -(-P // c.block_n)
        waves = -(-tiles // where.processors)
        area = c.block_m * c.block_n
        # A launch per tile pays its start and its epilogue where a persistent one overlaps them.
        start = 1.0 if c.flatten else 1.03
        return waves * area * start / _EFFICIENCY[area]

    candidates = [
        c
        for c in table
        if c.descriptor == usable_maps and not invalid(c, where, itemsize, rank, **flags)
    ]
    return min(candidates, key=estimate)


def members_per_launch(ranks: tuple[int, ...], most: int) -> list[tuple[int, int]]:
    """Ranges of members whose padded ranks together are at most `most`, or of one member."""
    ranges, first = [], 0
    for last in range(1, len(ranks) + 1):
        width = (last + 1 - first) * padded_rank(max(ranks[first : last + 1]))
        if last == len(ranks) or width > most:
            ranges.append((first, last))
            first = last
    return ranges


def shrink_width(itemsize: int, dropout: bool, vectors: bool = True) -> int:
    """Padded ranks of one shrink: what its registers hold, with a masked copy of X per member."""
    if dropout:
        return 64 if itemsize == 2 and vectors else 16
    return MAX_RANK if itemsize == 2 else 64


def _stages(bytes_per_stage: int, where: Target, most: int) -> int:
    """Stages that leave room for a second program; 1 is a loop without buffers."""
    for stages in range(most, 1, -1):
        if stages * bytes_per_stage <= where.shared_bytes // 2:
            return stages
    return 1


def _step(candidates: tuple[int, ...], bytes_per_step: int, where: Target, most: int) -> int:
    """The longest step of which three or more stages fit, else the shortest."""
    for step in candidates:
        if _stages(step * bytes_per_step, where, most) >= 3:
            return step
    return candidates[-1]


def _splits(blocks: int, steps: int, most: int, where: Target) -> int:
    """Programs along the walk: about two per multiprocessor in all, four steps or more for each."""
    wanted = 2 * where.processors // max(1, blocks)
    return max(1, min(wanted, steps // 4, most))


def invalid_rows(kernel: str, c: Rows, dropout: bool) -> str:
    """Why `c` cannot run, or ""."""
    powers = {"held": c.held, "step": c.step, "num_warps": c.num_warps}
    for name, value in {**powers, "splits": c.splits, "num_stages": c.num_stages}.items():
        if type(value) is not int or value < 1:
            return f"{name}={value!r}; accepted: whole numbers from 1"
    for name, value in powers.items():
        if value & (value - 1) or (name != "num_warps" and value < 16):
            least = "from 1 to 32" if name == "num_warps" else "from 16"
            return f"{name}={value}; accepted: powers of two {least}"
    if c.num_warps > 32 or c.num_stages > 8:
        return f"num_warps={c.num_warps}, num_stages={c.num_stages}; accepted: at most 32 and 8"
    # The columns of X that one step draws masks for; see ops/_triton_philox.py.
    axis = {"shrink": "step", "da_pass": "held"}.get(kernel)
    if dropout and axis and (width := powers[axis]) % 128 and width not in (32, 64):
        return f"{axis}={width}; accepted with dropout: 32, 64 or a multiple of 128"
    return ""


def _tuned_rows(kernel: str, where: Target, M: int, masked: bool, **key: Any) -> Rows | None:
    """The tuner's choice; InvalidArgumentError where a file holds what no tuner can have tried."""
    found = tuned_tiles.lookup(kernel, where.name, M, **key)
    if found is None:
        return None
    try:
        made = Rows(**found)
        why = invalid_rows(kernel, made, masked)
    except TypeError as error:
        why = str(error)
    if why:
        raise InvalidArgumentError(
            f"lora_linear: the tuned tile of {kernel} for {where.name} in tuned/ is not usable: "
            f"{why}; write the file anew (python -m benchmarks.tune --op lora_linear) or remove it"
        )
    return made


def shrink(
    M: int, K: int, total: int, itemsize: int, where: Target, dropout: bool, vectors: bool = True
) -> Rows:
    """`total`: padded ranks of the members of the launch, together; `vectors` as in `invalid`."""
    if "shrink" in _forced:
        return _forced["shrink"]
    tuned = _tuned_rows(
        "shrink", where, M, dropout, K=K, total=total, itemsize=itemsize, dropout=dropout
    )
    if tuned is not None:
        return tuned
    if itemsize == 4:  # multiply-add units: short steps, or the operands spill
        held, step, warps = 16 if total > 64 else 32, 32, 4 if total <= 64 else 8
    else:
        held = 16 if M <= 16 else 64 if 16 < total <= 128 else 32
        if where.amd and total > 128:
            held = 16
        # 32 columns draw every word of the generator four times: for ranks that drown its cost.
        whole = 128 if total <= (32 if where.amd else 128) else 32
        longest = (64, 32) if total > 64 else (128, 64, 32)
        step = whole if dropout else _step(longest, (held + total) * itemsize, where, 4)
        # Draws of several members and unaligned rows take registers: spread over more threads.
        warps = 8 if total >= 64 or (total > 16 and (dropout or not vectors)) else 4
    # Partial sums may cost a quarter of the pass over X.
    splits = _splits(-(-M // held), -(-K // step), max(1, K // (16 * total)), where)
    return Rows(held, step, splits, warps, _stages(step * (held + total) * itemsize, where, 4))


def dy_pass(M: int, N: int, rank: int, itemsize: int, where: Target) -> Rows:
    if "dy_pass" in _forced:
        return _forced["dy_pass"]
    tuned = _tuned_rows("dy_pass", where, M, False, N=N, rank=padded_rank(rank), itemsize=itemsize)
    if tuned is not None:
        return tuned
    padded = padded_rank(rank)
    held = max(64, min(256, (64 if where.amd else 128) * 64 // padded))
    if itemsize == 4:
        held = 32 if padded <= 128 else 16
    row = (held + padded) * itemsize
    step = _step((64, 32), row, where, 3)
    if padded > 64 and rank % 8:  # rows of S and B come in single elements
        held, step = 32, 16
    if itemsize == 4:
        step = 32 if padded <= 64 else 16
    splits = _splits(-(-N // held), -(-M // step), max(1, M // (16 * rank)), where)
    return Rows(held, step, splits, 4 if where.amd else 8, _stages(step * row, where, 3))


def ds_apart(rank: int, c: Rows, itemsize: int) -> bool:
    """Is dS better made by a pass of its own: the partial sums of dy_pass, written and read in
    fp32 for every `held` columns of dY, would be more bytes than dY is."""
    return 8 * rank > c.held * itemsize


def da_pass(M: int, K: int, total: int, itemsize: int, where: Target) -> Rows:
    if "da_pass" in _forced:
        return _forced["da_pass"]
    # The key does not say whether there is dropout: a tile has to do for both.
    tuned = _tuned_rows("da_pass", where, M, True, K=K, total=total, itemsize=itemsize)
    if tuned is not None:
        return tuned
    # With dropout a tile is 32 columns or whole blocks of 128, see the generator.
    held = 32 if itemsize == 4 or total > (32 if where.amd else 128) else 128
    row = (held + total) * itemsize
    step = _step((64, 32), row, where, 3) if total <= 64 else 32
    if itemsize == 4:
        step = 32 if total <= 64 else 16
    splits = _splits(-(-K // held), -(-M // step), max(1, M // (16 * total)), where)
    return Rows(held, step, splits, 8 if total >= 32 else 4, _stages(step * row, where, 3))


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
