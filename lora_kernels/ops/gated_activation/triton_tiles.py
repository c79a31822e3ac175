"""Tiles of the Triton kernels of gated_activation: functions of shape, dtype and architecture."""

from __future__ import annotations

from dataclasses import dataclass

MAX_RANK = 256
_MOST_GRID = 65535  # programs along the second axis
_PLAIN = (8, 256)  # rows and columns of a tile where there is nothing to multiply


@dataclass(frozen=True)
class Tile:
    """`rows` x `columns` of the activation per step, `splits` programs along the walk, of
    `per_split` steps (forward) or rows (backward) each."""

    rows: int
    columns: int
    splits: int
    per_split: int
    num_warps: int
    num_stages: int


def padded_rank(rank: int) -> int:
    """The power of two, at least 16, that a tensor core works on."""
    return max(16, 1 << (rank - 1).bit_length())


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


def plain_forward(M: int, N: int) -> Tile:
    rows, columns = _PLAIN
    blocks = -(-N // columns)
    per_split = max(1, -(-blocks // _MOST_GRID))
    return Tile(rows, columns, -(-blocks // per_split), per_split, 4, 1)


def plain_backward(M: int, N: int) -> Tile:
    rows, columns = _PLAIN
    steps = -(-M // rows)
    per_split = max(1, -(-steps // _MOST_GRID)) * rows
    return Tile(rows, columns, -(-M // per_split), per_split, 4, 1)


def _splits(blocks: int, steps: int, most: int, processors: int) -> int:
    """Programs along the walk: about four per multiprocessor in all, as each waits for memory most
    of the time, four steps or more for each."""
    wanted = 4 * processors // max(1, blocks)
    return max(1, min(wanted, steps // 4, most))


def shrink(M: int, N: int, total: int, itemsize: int, processors: int, amd: bool) -> Tile:
    """Forward with members of `total` padded columns. Few rows are shared between programs along
    N; the partial sums may cost an eighth of the pass, 3 `itemsize` M N bytes."""
    if itemsize == 4:
        rows, columns, warps, stages = 32 if total <= 32 else 16, 32, 4, 1
    else:
        rows = 16 if M <= 16 or (amd and total > 128) else 64 if 16 < total <= 64 else 32
        columns = 64 if total <= 64 else 32
        warps, stages = 8 if total >= 64 or rows == 64 else 4, 2
    steps = -(-N // columns)
    splits = _splits(-(-M // rows), steps, 3 * itemsize * N // (64 * total), processors)
    per_split = max(1, -(-steps // splits))
    return Tile(rows, columns, max(1, -(-steps // per_split)), per_split, warps, stages)


def gradients(
    M: int, N: int, padded: int, itemsize: int, processors: int, amd: bool, unit: bool = True
) -> Tile:
    """Backward with adapters of `padded` columns for each of gate and up; `unit`: neighbours in a
    row are neighbours in memory. The partial sums of dB may cost an eighth of the pass, 5
    `itemsize` M N bytes."""
    stages = 2
    if not unit:  # an address for every element
        rows, columns, warps, stages = 16, 32 if itemsize == 2 else 16, 4, 1
    elif itemsize == 4:
        rows, columns, warps = 16, 32 if padded <= (32 if amd else 128) else 16, 4
    else:
        columns = min(128, max(16, (1024 if amd else 4096) // padded))
        rows, warps = 32 if padded <= 64 else 16, 8
    steps = -(-M // rows)
    most = 5 * itemsize * M // (128 * padded)
    splits = _splits(-(-N // columns), steps, most, processors)
    per_split = max(1, -(-steps // splits)) * rows
    # A second stage would put AMD's scalar registers, which hold the arguments, on the stack.
    return Tile(rows, columns, max(1, -(-M // per_split)), per_split, warps, 1 if amd else stages)


def ds_apart(total: int, members: int, tile: Tile, itemsize: int) -> bool:
    """Is dS better made by a pass of its own over dgate and dup: its partial sums, written and
    read in fp32 for every tile of columns, would be more bytes than those are."""
    return 8 * total > tile.columns * itemsize * members
