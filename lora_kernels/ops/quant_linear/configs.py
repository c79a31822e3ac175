"""Tiles of the Triton kernels on quantized weights as data, and the analytic default.

The default is a function of format, shape, dtype and architecture alone: no measurement, no state.
Where the tuner measured a quicker tile on such a device, that one is taken. What decides the order
of a sum (:func:`walk`) does not see the number of rows, tuned or not, so that results do not depend
on the batch (triton_gemm.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops._tuned_tiles import TunedTiles
from lora_kernels.ops.quant_linear import formats
from lora_kernels.ops.quant_linear.formats import QuantSpec

MOST_ROWS = 128  # of the packed product; beyond, dequantization and a library GEMM
MAX_SPLITS = 8
RANK_BLOCK = 32
AHEAD = 4  # a split is a multiple of the most steps in flight
_MIN_STEPS = 8  # of a split
_MOST_SPLITS = 32  # that a tuned tile can have
TILES = TunedTiles("quant_linear")


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


@dataclass(frozen=True)
class Dequantize:
    """A tile of the kernel for packed rows."""

    rows: int
    columns: int
    num_warps: int


@dataclass(frozen=True)
class Flat:
    """Threads of a program of the kernel for the flat layout, eight elements each."""

    threads: int


def invalid(c: Walk | Launch | Dequantize | Flat) -> str:
    """Why no kernel can have this configuration, else ""; a device may still refuse it."""
    for name, value in vars(c).items():
        least, most = _RANGES[type(c), name]
        if type(value) is not int or not least <= value <= most or value & (value - 1):
            return f"{name}={value!r}; accepted: powers of two from {least} to {most}"
    return ""


# Steps: the widths whose masks ops/_triton_philox.py draws.
_RANGES: dict[tuple[type, str], tuple[int, int]] = {
    (Walk, "held"): (16, 256), (Walk, "step"): (32, 128), (Walk, "splits"): (1, _MOST_SPLITS),
    (Launch, "rows"): (16, 128), (Launch, "num_warps"): (1, 16), (Launch, "ahead"): (1, AHEAD),
    (Dequantize, "rows"): (8, 256), (Dequantize, "columns"): (32, 256),
    (Dequantize, "num_warps"): (1, 16), (Flat, "threads"): (32, 1024),
}  # fmt: skip


def _tuned(kernel: str, where: Target, rows: int, default: Any, **key: Any) -> Any:
    """The tuner's choice, else `default`; InvalidArgumentError where a file holds what no tuner
    can have tried."""
    found = TILES.lookup(kernel, where.name, rows, default, **key)
    if found is None:
        return default
    try:
        made = type(default)(**found)
        why = invalid(made)
    except TypeError as error:
        why = str(error)
    if why:
        raise InvalidArgumentError(
            f"quant_linear: the tuned tile of {kernel} for {where.name} in tuned/ is not usable: "
            f"{why}; write the file anew (python -m benchmarks.tune --op quant_linear) or remove it"
        )
    return made


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
    return _tuned(
        "walk", where, 1, _walk(spec, itemsize, backward, where), N=spec.rows, K=spec.columns,
        **_kind(spec), itemsize=itemsize, backward=backward,
    )  # fmt: skip


def _kind(spec: QuantSpec) -> dict[str, Any]:
    """What of a format decides how a tile is read."""
    return {
        "layout": spec.layout, "block": spec.block_size, "nested": spec.nested_block_size > 0,
        "act_order": spec.act_order,
    }  # fmt: skip


def _walk(spec: QuantSpec, itemsize: int, backward: bool, where: Target) -> Walk:
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


def launch(
    spec: QuantSpec, rows: int, itemsize: int, backward: bool, fast: bool, vectors: bool,
    where: Target,
) -> Launch:  # fmt: skip
    """Rows of the batch: the least power of two that holds them, at most 64. Steps in flight: what
    registers hold beside the sums and, where not `fast`, a scale per element. `vectors`: every row
    of the batch is whole 16 bytes at an aligned address."""
    if "launch" in _forced:
        return _forced["launch"]
    return _tuned(
        "launch", where, rows, _launch(rows, itemsize, backward, fast, vectors), N=spec.rows,
        K=spec.columns, **_kind(spec), itemsize=itemsize, backward=backward, vectors=vectors,
    )  # fmt: skip


def _launch(rows: int, itemsize: int, backward: bool, fast: bool, vectors: bool) -> Launch:
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


def dequantize(spec: QuantSpec, itemsize: int, where: Target) -> Dequantize:
    """Of every layout but the flat one."""
    return _tuned(
        "dequantize", where, 1, Dequantize(64, 64, 4), N=spec.rows, K=spec.columns, **_kind(spec),
        itemsize=itemsize,
    )  # fmt: skip


def dequantize_flat(spec: QuantSpec, itemsize: int, where: Target) -> Flat:
    return _tuned(
        "dequantize_flat", where, 1, Flat(256), elements=spec.numel, **_kind(spec),
        itemsize=itemsize,
    )  # fmt: skip


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
