"""Tiles of the attention kernels as data, and the analytic default.

The default is a function of head sizes, dtype, features and architecture alone: no measurement, no
state. What a tile may need was read from the compiler's output (no spilled register, shared memory
within the device's): tests/triton/suite_ahead_of_time_attention.py compiles them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

MAX_HEAD = 256
# Dynamic shared memory that one program can ask for, from the vendors' tables.
SHARED_BYTES = {
    "sm_80": 166912, "sm_86": 101376, "sm_87": 166912, "sm_89": 101376, "sm_90": 232448,
    "sm_100": 232448, "sm_103": 232448, "sm_120": 101376, "sm_121": 101376,
    "gfx90a": 65536, "gfx942": 65536, "gfx950": 163840,
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A device: ``sm_90`` or ``gfx942``, and what one program can have of its shared memory."""

    name: str
    shared_bytes: int
    processors: int = 1

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")


def target(name: str, processors: int = 1, shared_bytes: int = 0) -> Target:
    return Target(name, shared_bytes or SHARED_BYTES.get(name, 65536), processors)


@dataclass(frozen=True)
class Tile:
    """`rows` queries x `keys` keys at a time."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def parts(size: int) -> tuple[int, int]:
    """A head of `size` columns as one or two powers of two of at least 16; the second may be 0."""
    whole = -(-size // 16) * 16
    first = 1 << (whole.bit_length() - 1)
    if first == whole:
        return whole, 0
    second = max(16, 1 << (whole - first - 1).bit_length())
    return (2 * first, 0) if second == first else (first, second)


def padded(size: int) -> int:
    return sum(parts(size))


_forced: dict[str, Tile] = {}


@contextmanager
def forced(**tiles: Tile) -> Iterator[None]:
    """Takes these tiles: forward, grad_q, grad_kv, grad_mask, decode. For the tuner and tests."""
    before = dict(_forced)
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def _column(*tiles: tuple[int, int, int, int]) -> tuple[Tile, ...]:
    return tuple(Tile(*numbers) for numbers in tiles)


# By kernel and burden (0 none, 1 softcap or ALiBi, 2 mask or dropout), for heads that are padded to
# 64, 128 and 256. Matrix units that read shared memory, and 227 KiB of it:
_HOPPER = {
    ("forward", 0): _column((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2)),
    ("forward", 1): _column((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2)),
    ("forward", 2): _column((128, 64, 8, 3), (64, 64, 8, 2), (128, 32, 8, 2)),
    ("grad_q", 0): _column((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
    ("grad_q", 1): _column((128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 8, 1)),
    ("grad_q", 2): _column((128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    ("grad_kv", 0): _column((64, 128, 8, 2), (32, 128, 8, 2), (32, 32, 8, 1)),
    ("grad_kv", 1): _column((64, 128, 8, 2), (32, 64, 8, 2), (16, 32, 8, 1)),
    ("grad_kv", 2): _column((32, 128, 8, 2), (32, 32, 8, 2), (16, 32, 8, 1)),
    ("grad_mask", 2): _column((32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
}
# Matrix units that read registers:
_AMPERE = _HOPPER | {
    ("forward", 0): _column((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    ("forward", 1): _column((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
    ("forward", 2): _column((128, 64, 8, 3), (64, 64, 8, 2), (64, 32, 8, 2)),
    ("grad_q", 0): _column((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
    ("grad_q", 1): _column((128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    ("grad_q", 2): _column((64, 32, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    ("grad_kv", 0): _column((32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
    ("grad_kv", 1): _column((32, 64, 8, 2), (32, 64, 8, 2), (16, 32, 8, 1)),
    ("grad_kv", 2): _column((32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 1)),
}
_AMD = {
    ("forward", 0): _column((128, 64, 4, 1), (128, 32, 4, 1), (64, 32, 4, 1)),
    ("forward", 1): _column((128, 64, 4, 1), (128, 32, 4, 1), (64, 32, 4, 1)),
    ("forward", 2): _column((64, 64, 4, 1), (64, 32, 4, 1), (64, 32, 8, 1)),
    ("grad_q", 0): _column((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    ("grad_q", 1): _column((64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    ("grad_q", 2): _column((64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    ("grad_kv", 0): _column((32, 64, 4, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
    ("grad_kv", 1): _column((32, 64, 4, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
    ("grad_kv", 2): _column((32, 64, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
    ("grad_mask", 2): _column((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
}
# Multiply-add units: every operand of a step is in registers.
_FP32 = {
    "forward": _column((32, 32, 4, 2), (32, 32, 8, 2), (16, 32, 8, 1)),
    "grad_q": _column((32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    "grad_kv": _column((32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
    "grad_mask": _column((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
}
_SHARED_UNITS = ("sm_90", "sm_100", "sm_103")


def shared_bytes(kernel: str, tile: Tile, D: int, Dv: int, itemsize: int, burden: int) -> int:
    """Upper bound of what the compiler asks for: what stays, what is walked over, a mask."""
    both = (padded(D) + padded(Dv)) * itemsize
    held, walked, row = tile.rows, tile.keys, both
    if kernel == "grad_kv":
        held, walked = tile.keys, tile.rows
    elif kernel == "forward":
        row = padded(D) * itemsize
    mask = tile.rows * tile.keys * max(itemsize, 2) if burden == 2 else 0
    return tile.num_stages * (walked * both + mask) + held * row + 1024


def choose(kernel: str, D: int, Dv: int, itemsize: int, where: Target, burden: int) -> Tile:
    """Default tile of `kernel`. `burden`: 1 with softcap or ALiBi, 2 with a mask or dropout."""
    if kernel in _forced:
        return _forced[kernel]
    width = max(padded(D), padded(Dv))
    place = 0 if width <= 64 else 1 if width <= 128 else 2
    two_parts = parts(D)[1] + parts(Dv)[1] > 0
    in_registers = kernel == "grad_kv" or where.name not in _SHARED_UNITS
    if burden == 2 and two_parts and in_registers:
        place = 2  # addresses and masks of both parts beside their operands
    if itemsize == 4:
        tile = _FP32[kernel][place]
    else:
        table = _AMD if where.amd else _HOPPER if where.name in _SHARED_UNITS else _AMPERE
        tile = table[kernel, burden][place]
        if where.amd and two_parts and width > 128:
            tile = replace(tile, rows=16 if kernel == "grad_kv" else 32, keys=32, num_warps=8)
    while shared_bytes(kernel, tile, D, Dv, itemsize, burden) > where.shared_bytes:
        smaller = _smaller(tile)
        if smaller == tile:
            break
        tile = smaller
    return tile


def decode(rows: int, D: int, Dv: int, itemsize: int, where: Target) -> Tile:
    """Tile of the kernel over a cache: `rows` queries of the heads of a group."""
    if "decode" in _forced:
        return _forced["decode"]
    held = 16 if rows <= 16 else 32 if rows <= 32 or itemsize == 4 or where.amd else 64
    width = max(padded(D), padded(Dv))
    if itemsize == 4:
        return Tile(16, 32, 4 if width <= 64 else 8, 1)
    keys = 128 if width <= 64 and held == 16 else 64 if width <= 128 else 32
    stages = 1 if where.amd else 3 if width <= 128 else 2
    tile = Tile(held, keys, 4 if held == 16 and width <= 128 else 8, stages)
    while shared_bytes("decode", tile, D, Dv, itemsize, 0) > where.shared_bytes:
        tile = _smaller(tile)
    return tile


def decode_splits(programs: int, capacity: int, keys: int, where: Target) -> int:
    """Two programs per multiprocessor in all, four tiles of keys or more for each."""
    wanted = 2 * where.processors // max(1, programs)
    return max(1, min(wanted, capacity // (4 * keys), 32))


def _smaller(tile: Tile) -> Tile:
    """Fewer stages, then fewer keys, then fewer rows; tiles of 32 keys are whole draws."""
    if tile.num_stages > 1:
        return replace(tile, num_stages=tile.num_stages - 1)
    if tile.keys > 32:
        return replace(tile, keys=tile.keys // 2)
    return replace(tile, rows=max(16, tile.rows // 2))


def splits_loops(D: int, Dv: int, where: Target, burden: int) -> bool:
    """Do forward and grad_q walk over whole tiles in a loop of its own: it saves the checks and
    takes registers."""
    if burden != 0 or where.amd or max(padded(D), padded(Dv)) > 128:
        return False
    return where.name in _SHARED_UNITS or parts(D)[1] == parts(Dv)[1] == 0
