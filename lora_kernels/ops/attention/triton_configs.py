"""Tiles of the attention kernels as data, and the analytic default.

The default is a function of head sizes, dtype, features and architecture alone: no measurement, no
state. What a tile may need was read from the compiler's output (no spilled register, shared memory
within the device's): tests/triton/suite_ahead_of_time_attention.py compiles them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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


# Candidates, the preferred one first, by kernel and padded head: 16-bit types on NVIDIA, then AMD.
# The second list is for what takes registers beside the scores: softcap, ALiBi; masks, dropout.
_T = Tile
_PLAIN: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {
        64: (_T(128, 128, 8, 2), _T(128, 64, 8, 3), _T(64, 32, 4, 2)),
        128: (_T(128, 128, 8, 2), _T(128, 64, 8, 3), _T(128, 32, 8, 2)),
        256: (_T(128, 32, 8, 2), _T(64, 32, 8, 2), _T(64, 32, 8, 1)),
    },
    "grad_q": {
        64: (_T(128, 64, 8, 2), _T(64, 64, 8, 1)),
        128: (_T(128, 64, 8, 2), _T(64, 64, 8, 2), _T(64, 32, 8, 1)),
        256: (_T(64, 32, 8, 2), _T(32, 32, 8, 1)),
    },
    "grad_kv": {
        64: (_T(64, 128, 8, 2), _T(32, 128, 8, 2)),
        128: (_T(64, 128, 8, 2), _T(32, 64, 8, 2)),
        256: (_T(32, 32, 8, 1),),
    },
}


def shared_bytes(kernel: str, tile: Tile, D: int, Dv: int, itemsize: int, burden: int) -> int:
    """Upper bound of what the compiler asks for: what stays, what is walked over, a mask."""
    held, walked = (tile.keys, tile.rows) if kernel == "grad_kv" else (tile.rows, tile.keys)
    row = (padded(D) + padded(Dv)) * itemsize
    mask = tile.rows * tile.keys * max(itemsize, 2) if burden == 2 else 0
    return tile.num_stages * (walked * row + mask) + held * row + 1024


def choose(kernel: str, D: int, Dv: int, itemsize: int, where: Target, burden: int) -> Tile:
    """Default tile of `kernel`. `burden`: 1 with softcap or ALiBi, 2 with a mask or dropout."""
    if kernel in _forced:
        return _forced[kernel]
    return Tile(64, 32, 4, 1)
