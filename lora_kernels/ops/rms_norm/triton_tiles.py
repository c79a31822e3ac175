"""Tiles of the Triton kernels of rms_norm: functions of shape, dtype and architecture."""

from __future__ import annotations

from dataclasses import dataclass

MAX_RANK = 256
# Channels of a row that the registers of one program hold.
_WHOLE_ROW = 16384
_WHOLE_ROW_BACKWARD = 8192  # dy, x and a share of dweight
_HELD = 2048  # elements of a tile of whole rows, at least


@dataclass(frozen=True)
class Tile:
    """`rows` x `columns` per step; `whole`: a row is one step. `per_program`: rows that one program
    walks over (backward)."""

    rows: int
    columns: int
    whole: bool
    num_warps: int
    num_stages: int
    per_program: int = 0


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded_rank(rank: int) -> int:
    """The power of two, at least 16, that a tensor core works on."""
    return max(16, _power(max(1, rank)))


def widest(itemsize: int) -> int:
    """Padded ranks that the registers of one launch hold."""
    return MAX_RANK if itemsize == 2 else 64


def launches(ranks: tuple[int, ...], itemsize: int) -> list[tuple[int, int]]:
    """Ranges of members for one launch each."""
    most, ranges, first = widest(itemsize), [], 0
    for last in range(1, len(ranks) + 1):
        width = (last + 1 - first) * padded_rank(max(ranks[first : last + 1]))
        if last == len(ranks) or width > most:
            ranges.append((first, last))
            first = last
    return ranges


def _rows_of(columns: int) -> tuple[int, int]:
    """(rows, warps) of a tile of whole rows: 16 elements per thread, 32 of the longest rows."""
    rows = max(1, _HELD // columns)
    return rows, min(16, max(4, rows * columns // 512))


def plain(K: int) -> Tile:
    """Forward without members."""
    if K > _WHOLE_ROW:
        return Tile(1, 4096, False, 8, 1)
    columns = _power(K)
    rows, warps = _rows_of(columns)
    return Tile(rows, columns, True, warps, 1)


def shrink(M: int, K: int, total: int, itemsize: int, processors: int, amd: bool) -> Tile:
    """Forward with members of `total` padded columns.

    More rows read A less often, but the rows of all programs under way have to stay in L2 between
    the walks: 64 KiB each, two or three programs per multiprocessor, is 20 MiB on a large device.
    K is not split: a row has one rstd.
    """
    step, warps = (64, 8) if total >= 64 else (128, 4)
    rows = 16
    if itemsize == 4:
        step = 32
    else:
        while rows < (32 if amd or total > 128 else 64) and 2 * rows * K <= 1 << 16:
            if -(-M // (2 * rows)) < processors:
                break
            rows *= 2
    return Tile(rows, step, False, warps, 1 if amd else 2)


def gradients(M: int, K: int, processors: int) -> Tile:
    """Backward. Two programs per multiprocessor: more have more partial sums of dweight."""
    if K > _WHOLE_ROW_BACKWARD:
        rows, columns, whole, warps = 1, 4096, False, 8
    else:
        columns, whole = _power(K), True
        rows, warps = _rows_of(columns)
    steps = -(-M // rows)
    per_program = max(1, -(-steps // (2 * processors))) * rows
    return Tile(rows, columns, whole, warps, 2, per_program)
