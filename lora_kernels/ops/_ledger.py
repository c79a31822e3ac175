"""Evidence that a GPU backend is right and quick: what `auto` needs before it picks one.

`ops/<op>/tuned/<device>.json` is derived from a result file that was measured on that device
(``python -m benchmarks.tune``). It says, per backend, whether its checks passed there, from which
sources it was built, and how long it and `aten` took. Whatever is not in such a file has never
run on hardware as far as this package knows. A file that cannot be read is no evidence, and says
why; it never stops a call.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_kernels._backends import cuda as cuda_library

SCHEMA = 2
VERDICTS = ("passed", "failed", "not run")
DIRECTIONS = ("fwd", "bwd")
# Pairs of ops that are measured together: a change of either's kernels ends their evidence.
PAIRS = {
    "norm_shrink": ("rms_norm", "lora_linear"),
    "activation_shrink": ("gated_activation", "lora_linear"),
}
PACKAGE = Path(__file__).resolve().parents[1]
# What a backend's results depend on; `{op}` is the op's folder. chunks: loops that backends share.
SOURCES = {
    "triton": ("ops/_*triton*.py", "ops/{op}/triton*.py", "ops/{op}/*configs.py",
               "ops/{op}/chunks.py", "_backends/triton*.py"),
    "cuda": ("ops/_*cuda*.py", "ops/{op}/cuda*.py", "ops/{op}/chunks.py", "_backends/cuda*.py"),
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """A GPU as evidence names it: ``NVIDIA H100 80GB HBM3``, ``sm_90``."""

    name: str
    architecture: str


@dataclass(frozen=True)
class Entry:
    """Times of one problem in one direction, `ms` per backend. A measurement speaks for other
    `sizes` near by, but for no other `kind`; both are the op's (see _evidence.py)."""

    sizes: dict[str, int]
    kind: dict[str, Any]
    direction: str
    ms: dict[str, float]


@dataclass(frozen=True)
class Table:
    """One file. `backends`: name -> ``{"verdict", "digest"}``; `configs`: the tuner's choices."""

    device: Device
    date: str
    commit: str
    backends: dict[str, dict[str, str]]
    entries: tuple[Entry, ...]
    configs: tuple[dict[str, Any], ...] = field(default=())


def device(index: int) -> Device | None:
    """The GPU of that index, or None where torch sees none."""
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    return _device(index)


@functools.cache
def _device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Device(found.name, str(found.gcnArchName).split(":")[0])
    return Device(found.name, f"sm_{found.major}{found.minor}")


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(what)


def _entry(raw: dict[str, Any]) -> Entry:
    made = Entry(
        sizes=dict(raw["sizes"]), kind=dict(raw["kind"]), direction=raw["direction"],
        ms=dict(raw["ms"]),
    )  # fmt: skip
    _require(
        bool(made.sizes) and all(type(n) is int and n > 0 for n in made.sizes.values()),
        f"sizes={made.sizes} of an entry",
    )
    _require(made.direction in (*DIRECTIONS, "fwdbwd"), f"direction={made.direction!r}")
    _require(
        all(type(t) in (int, float) and math.isfinite(t) and t > 0 for t in made.ms.values()),
        f"ms={made.ms}",
    )
    return made


def parse(raw: Any, op: str) -> Table:
    """The table in a decoded file; ValueError says what is wrong with it."""
    try:
        _require(raw["schema"] == SCHEMA, f"schema={raw['schema']!r}, known: {SCHEMA}")
        _require(raw["op"] == op, f"op={raw['op']!r}, expected {op!r}")
        where = Device(raw["device"]["name"], raw["device"]["architecture"])
        _require(bool(where.name and where.architecture), "device without a name")
        backends = {
            name: {"verdict": b["verdict"], "digest": b["digest"]}
            for name, b in raw["backends"].items()
        }
        for name, b in backends.items():
            _require(b["verdict"] in VERDICTS, f"verdict={b['verdict']!r} of {name}")
        return Table(
            device=where,
            date=str(raw["date"]),
            commit=str(raw["commit"]),
            backends=backends,
            entries=tuple(_entry(e) for e in raw["entries"]),
            configs=tuple(dict(c) for c in raw.get("configs", ())),
        )
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a table: {error}") from None


def folder(op: str) -> Path:
    return PACKAGE / "ops" / op / "tuned"


@functools.cache
def read(where: Path, op: str) -> tuple[tuple[Table, ...], tuple[str, ...]]:
    """(tables, newest first; one line for each file that is no evidence)."""
    tables, refused = [], []
    for path in sorted(where.glob("*.json")):
        try:
            tables.append(parse(json.loads(path.read_text(encoding="utf-8")), op))
        except (OSError, ValueError) as error:
            refused.append(f"tuned/{path.name} is not usable: {' '.join(str(error).split())}")
    return tuple(sorted(tables, key=lambda t: t.date, reverse=True)), tuple(refused)


def table_for(here: Device, tables: tuple[Table, ...]) -> Table | None:
    """The newest table of this very device, else of its architecture."""
    for same in (
        lambda t: t.device == here,
        lambda t: t.device.architecture == here.architecture,
    ):
        for table in tables:
            if same(table):
                return table
    return None


def digest_of(paths: list[Path]) -> str:
    """SHA-256 over names and contents; line ends do not count."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        content = path.read_bytes().replace(b"\r\n", b"\n")
        total.update(f"{path.name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()[:16]


@functools.cache
def source_digest(op: str, backend: str) -> str:
    """What identifies the kernels of `backend`. For compiled ones the library says from which
    sources it was built; a library that cannot say is identified by its own bytes."""
    if op in PAIRS:
        first, behind = PAIRS[op]
        parts = [source_digest(first, backend), *(source_digest(behind, b) for b in SOURCES)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    paths = [p for pattern in SOURCES[backend] for p in PACKAGE.glob(pattern.format(op=op))]
    own = digest_of(paths)
    return own if backend != "cuda" else f"{own}-{_library_digest(op)}"


def digest(op: str, backend: str, configs: tuple[dict[str, Any], ...]) -> str:
    """:func:`source_digest`, and for triton the tuned tiles that the kernels run with."""
    own = source_digest(op, backend)
    if backend != "triton" or not configs:
        return own
    told = json.dumps(configs, sort_keys=True).encode()
    return f"{own}-{hashlib.sha256(told).hexdigest()[:8]}"


def tiles_in_force(op: str, table: Table | None) -> tuple[dict[str, Any], ...]:
    """The tuned tiles of a table while the kernels are those they were tuned for, else none."""
    if table is None or "triton" not in table.backends:
        return ()
    same = table.backends["triton"]["digest"] == digest(op, "triton", table.configs)
    return table.configs if same else ()


def digests_here(op: str, index: int = 0) -> dict[str, str]:
    """What a measurement on the GPU of that index is a measurement of."""
    here = device(index)
    table = table_for(here, read(folder(op), op)[0]) if here else None
    return {b: digest(op, b, tiles_in_force(op, table)) for b in SOURCES}


def _library_digest(op: str) -> str:
    library, _ = cuda_library.load()
    if library is None:
        return "absent"
    told = re.search(rf"\b{op}:([0-9a-f]+)", library.build_info())
    return told[1] if told else digest_of([cuda_library.path()])
