"""Search of tiles for the Triton kernels of quant_linear: products with the packed weight, and
dequantization.

The cases of the op's row in gpu_ops run once, while the kernels say what they look up and what the
analytic default is. Every candidate then runs the whole direction in place of the default, is
checked against the oracle, and takes turns with the default on the clock. A tile that orders sums
is looked up without the number of rows, so it is tuned at the first case that asks for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any

from benchmarks import gpu
from benchmarks.gpu_ops import quant_linear
from benchmarks.gpu_ops.row import GpuOp, Judge, Work
from benchmarks.peers import UnavailableError
from benchmarks.tile_search import best
from benchmarks.timing import Timed, measure
from lora_kernels.ops._tuned_tiles import Asked, entry_of
from lora_kernels.ops.quant_linear import configs
from lora_kernels.testing import moved

OP = "quant_linear"


def installed(found: list[dict[str, Any]]) -> AbstractContextManager[None]:
    """Inside, look-ups find these tiles and no others."""
    return configs.TILES.installed(tuple(found))


def candidates(default: Any) -> list[Any]:
    """Tiles worth a try, the default left out."""

    def near(name: str, *factors: float) -> list[Any]:
        value = getattr(default, name)
        return [replace(default, **{name: int(value * f)}) for f in factors]

    if isinstance(default, configs.Walk):
        found = near("splits", 0.5, 2, 4) + near("held", 0.5, 2) + near("step", 0.5, 2)
    elif isinstance(default, configs.Launch):
        found = near("ahead", 0.5, 2, 4) + near("rows", 0.5, 2) + near("num_warps", 2)
    elif isinstance(default, configs.Dequantize):
        found = near("rows", 0.5, 2) + near("columns", 2, 4) + near("num_warps", 2)
        found += [replace(default, rows=32, columns=128), replace(default, rows=16, columns=256)]
    else:
        found = near("threads", 0.5, 2)
    return [c for c in dict.fromkeys(found) if c != default and not configs.invalid(c)]


def search(
    timed: Timed, until: float, say: Callable[[str], None], row: GpuOp = quant_linear.ROW,
    device: str = "cuda",
) -> list[dict[str, Any]]:  # fmt: skip
    """Tuned tiles, as the file holds them. Ends at `until` (time.monotonic); says what it left."""
    found: list[dict[str, Any]] = []
    done: set[Asked] = set()
    for label, keywords in row.cases.items():
        if time.monotonic() > until:
            say(f"no time left for {label}")
            continue
        inputs = moved(row.inputs(**keywords), device)
        able, why = row.able(inputs, "triton", device)
        if not able:
            say(f"triton: {label}: {why}")
            continue
        work, judge = row.work(inputs, "triton"), row.judge(inputs)
        with installed(found), configs.TILES.recorded() as asked:
            work.results()
        for entry, default in asked.items():
            if entry not in done and time.monotonic() < until:
                done.add(entry)
                made = _one(entry, default, work, judge, timed, say, found)
                found += [made] if made else []
    return found


def _one(
    asked: Asked, default: Any, work: Work, judge: Judge, timed: Timed, say: Callable[[str], None],
    found: list[dict[str, Any]],
) -> dict[str, Any] | None:  # fmt: skip
    """The best tile of one look-up, None where that is the default."""
    kernel, _, rows, pairs = asked
    call = work.bwd if dict(pairs).get("backward") else work.fwd

    def runner(tile: Any) -> Callable[[], object]:
        entries = [entry_of(asked, asdict(tile)), *found]

        def run() -> object:
            with installed(entries):
                return call()

        return run

    works, chosen = {"default": runner(default)}, {"default": default}
    for number, tile in enumerate(candidates(default)):
        name = f"tile {number}"
        try:
            with installed([entry_of(asked, asdict(tile)), *found]):
                judge(work.results(), name)
            works[name], chosen[name] = runner(tile), tile
        except UnavailableError:
            raise
        except Exception as error:  # wrong, or more than the device has: not a candidate
            text = (str(error).splitlines() or [type(error).__name__])[0]
            say(f"{kernel} {tile}: {text[:120]}")
            gpu.still_there(kernel)
    timings = measure(works, "default", rounds=7, round_seconds=0.005, timed=timed)
    winner = best(timings, "default")
    if winner is None:
        return None
    name, ratio = winner
    say(f"{kernel} {dict(pairs)} rows={rows}: {chosen[name]}, {ratio:.3f} of the default")
    return {**entry_of(asked, asdict(chosen[name])), "ratio_to_default": ratio}
