"""Tiles of the Triton kernels on quantized weights as data, and the analytic default.

A function of format, shape, dtype and architecture alone: no measurement, no state. What decides
the order of a sum (:func:`walk`) does not see the number of rows, so that results do not depend on
the batch (triton_gemm.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lora_kernels.ops.quant_linear import formats
from lora_kernels.ops.quant_linear.formats import QuantSpec

MOST_ROWS = 128  # of the packed product; beyond, dequantization and a library GEMM
MAX_SPLITS = 8
RANK_BLOCK = 32
AHEAD = 4  # a split is a multiple of the most steps in flight
_MIN_STEPS = 8  # of a split


@dataclass(frozen=True)
class Target:
    """A device as the configurations see it."""

    name: str
    processors: int
    shared_bytes: int = 65536

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")


@dataclass(frozen=True)
class Walk:
    """What fixes the order of the sums: `held` rows of the weight against steps of `step`."""

    held: int
    step: int
    splits: int


@dataclass(frozen=True)
class Launch:
    """What does not: rows of the batch per program, warps, steps in flight (a power of two)."""

    rows: int
    num_warps: int
    ahead: int


def is_fast(spec: QuantSpec, columns: int) -> bool:
    """One scale per row of a tile of `columns` columns that begins at a multiple of them."""
    if spec.layout == formats.FLAT:
        return spec.columns % columns == 0 and spec.block_size % columns == 0
    if spec.format == "int4":
        return not spec.act_order and spec.block_size % columns == 0
    return spec.layout != formats.FP8_BLOCK or spec.block_size % columns == 0


def _columns(spec: QuantSpec, most: int) -> int:
    """The widest tile along K that is fast, else the widest."""
    width = most
    while width > 32 and not is_fast(spec, width):
        width //= 2
    return width if is_fast(spec, width) else most


def walk(spec: QuantSpec, itemsize: int, backward: bool, where: Target) -> Walk:
    """`backward`: the weight's rows are summed over and its columns held."""
    if "walk" in _forced:
        return _forced["walk"]
    if itemsize == 4:  # multiply-add units: operands of a step are in registers
        held, step = 32, 32
    elif backward:
        held, step = _columns(spec, 64), 32
    else:
        held, step = 64, _columns(spec, 64)
    extent, total = spec.rows, spec.columns
    if backward:
        extent, total = total, extent
    tiles, steps = -(-extent // held), -(-total // step)
    wanted = min(2 * where.processors // max(1, tiles), steps // _MIN_STEPS, MAX_SPLITS)
    splits = 1 << max(0, wanted.bit_length() - 1) if wanted > 0 else 1
    return Walk(held, step, splits)


def launch(rows: int, itemsize: int, backward: bool, fast: bool, vectors: bool) -> Launch:
    """Rows of the batch: the least power of two that holds them, at most 64. Steps in flight: what
    registers hold beside the sums and, where not `fast`, a scale per element. `vectors`: every row
    of the batch is whole 16 bytes at an aligned address."""
    if "launch" in _forced:
        return _forced["launch"]
    most = 64 if fast and vectors else 32
    if itemsize == 4 or backward:  # backward, the tile is turned on its way to the matrix unit
        most = 32 if fast and vectors else 16
    tile = 16
    while tile < min(rows, most):
        tile *= 2
    if not fast or not vectors or itemsize == 4:
        return Launch(tile, 4, 1)
    if backward:
        return Launch(tile, 4, 2 if tile == 16 else 1)
    return Launch(tile, 4, AHEAD if tile <= 32 else 2)


_forced: dict[str, Any] = {}


@contextmanager
def forced(**choices: Walk | Launch) -> Iterator[None]:
    """Inside, `walk` or `launch` is the given one: for tuners and tests."""
    before = dict(_forced)
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
