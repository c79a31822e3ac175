"""Search of tiles for the Triton kernels of lora_linear.

For each problem the kernels say what they look up (kernel, rows, key); every candidate tile runs
the whole direction in place of the default, is checked against the oracle, and takes turns with
the default on the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from benchmarks import gpu, providers
from benchmarks.gate import Gate
from benchmarks.peers import UnavailableError
from benchmarks.providers import Case
from benchmarks.timing import Timed, Timing, measure
from lora_kernels.ops.lora_linear import configs as tiles
from lora_kernels.ops.lora_linear import tuned_tiles

OP = "lora_linear"
# A tile has to win by more than the spread of two runs of one tile.
GAIN = 0.99
DIRECTION = {"shrink": "fwd", "dy_pass": "bwd", "da_pass": "bwd"}
Asked = tuple[str, str, int, tuple[tuple[str, Any], ...]]


@contextmanager
def recorded(asked: list[Asked]) -> Iterator[None]:
    """Inside, every look-up of a tile is noted and finds nothing."""
    real = tuned_tiles.lookup

    def note(kernel: str, architecture: str, rows: int, **key: Any) -> None:
        entry = (kernel, architecture, rows, tuple(sorted(key.items())))
        if entry not in asked:
            asked.append(entry)

    tuned_tiles.lookup = note
    try:
        yield
    finally:
        tuned_tiles.lookup = real


@contextmanager
def installed(found: list[dict[str, Any]]) -> Iterator[None]:
    """Inside, look-ups find these tiles and no others."""
    real = tuned_tiles._configs
    tuned_tiles._configs = lambda architecture: tuple(found)
    tuned_tiles._lookup.cache_clear()
    try:
        yield
    finally:
        tuned_tiles._configs = real
        tuned_tiles._lookup.cache_clear()


def candidates(asked: Asked, default: Any, processors: int) -> list[Any]:
    """Tiles worth a try, the default left out."""
    kernel, architecture, _, pairs = asked
    key, where = dict(pairs), tiles.target(architecture, processors)
    if kernel == "gemm":
        found = [
            c
            for c in tiles.gemm_table(key["itemsize"], where)
            if c.descriptor == key["descriptor"]
            and not tiles.invalid(
                c, where, key["itemsize"], key["rank"],
                dropout=key["dropout"], exact=key["exact"], members=key["members"],
            )
        ]  # fmt: skip
        found += [replace(c, group_m=g) for c in found[:2] for g in (4, 16)]
    else:
        found = [replace(default, splits=n) for n in near(default.splits, (0.5, 2, 4))]
        found += [replace(default, num_stages=n) for n in (2, 3, 4)]
        found += [replace(default, num_warps=n) for n in (4, 8)]
        found += [replace(default, held=n) for n in near(default.held, (0.5, 2)) if n >= 16]
        found += [replace(default, step=n) for n in near(default.step, (0.5, 2)) if n >= 16]
        masked = kernel == "da_pass" or key.get("dropout", False)
        found = [c for c in found if not tiles.invalid_rows(kernel, c, masked)]
    return [c for c in dict.fromkeys(found) if c != default]


def near(value: int, factors: tuple[float, ...]) -> list[int]:
    return [max(1, int(value * f)) for f in factors]


def best(timings: dict[str, Timing], baseline: str) -> tuple[str, float] | None:
    """(name, time over the default's) of the quickest that wins by more than noise."""
    name = min(timings, key=lambda n: timings[n].ratio.median)
    ratio = timings[name].ratio.median
    return None if name == baseline or ratio > GAIN else (name, ratio)


def search(
    timed: Timed, until: float, say: Callable[[str], None], cases: tuple[Case, ...] = gpu.CASES,
    processors: int | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Tuned tiles, as the file holds them. Ends at `until` (time.monotonic); says what it left."""
    found: list[dict[str, Any]] = []
    done: set[Asked] = set()
    for case in cases:
        # The tiles of a group are those of its members.
        if case.others:
            continue
        if time.monotonic() > until:
            say(f"no time left for {case}")
            continue
        gate = Gate()
        try:
            provider = providers.build("triton", case)
            asked: list[Asked] = []
            with recorded(asked):
                provider.fwdbwd()
        except UnavailableError as error:
            say(f"triton: {error}")
            return []
        for entry in asked:
            if entry not in done and time.monotonic() < until:
                done.add(entry)
                made = one(entry, case, gate, timed, say, processors or gpu.processors())
                found += [made] if made else []
    return found


def one(
    asked: Asked, case: Case, gate: Gate, timed: Timed, say: Callable[[str], None], processors: int
) -> dict[str, Any] | None:
    """The best tile of one look-up, None where that is the default."""
    kernel, architecture, rows, pairs = asked
    default = _default(asked, processors)
    direction = DIRECTION.get(kernel) or ("fwd" if dict(pairs)["P"] == case.N else "bwd")
    works: dict[str, Any] = {}
    chosen: dict[str, Any] = {"default": default}

    provider = providers.build("triton", case)

    def runner(tile: Any) -> Callable[[], object]:
        def work() -> object:
            with tiles.forced(**{kernel: tile}):
                return getattr(provider, direction)()

        return work

    works["default"] = runner(default)
    for number, tile in enumerate(candidates(asked, default, processors)):
        name = f"tile {number}"
        try:
            with tiles.forced(**{kernel: tile}):
                gate.check(provider, case)
            works[name], chosen[name] = runner(tile), tile
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
    return {
        "backend": "triton", "kernel": kernel, "architecture": architecture, "rows": rows,
        "key": dict(pairs), "config": asdict(chosen[name]), "ratio_to_default": ratio,
    }  # fmt: skip


def _default(asked: Asked, processors: int) -> Any:
    """What configs.py answers when nothing was tuned."""
    kernel, architecture, rows, pairs = asked
    key, where = dict(pairs), tiles.target(architecture, processors)
    with recorded([]):
        return getattr(tiles, kernel)(rows, where=where, **key)
