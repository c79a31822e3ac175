"""What `auto` may pick on a GPU, from measurements on it: ops/<op>/tuned/<device>.json.

    python -m benchmarks.tune --op lora_linear                 search tiles, then measure (GPU)
    python -m benchmarks.tune --op lora_linear --from RECORD   take a record of gpu-check (no GPU)

The search, of lora_linear and of quant_linear, tries the tiles of configs.py on the benchmark's
problems, keeps those that are right and quicker than the analytic default, and then times the
backends with them. A verdict of the full check (tests, sanitizer) comes from its record only: run
`make gpu-check` after the search and take its record with --from; the tiles that are there stay.

Exit codes: 0 written, 1 nothing could be measured, 2 wrong arguments or record, 3 no GPU here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks import gpu, gpu_report, machine, tile_search, tile_search_packed
from benchmarks import record as records
from benchmarks.gpu_ops import ROWS
from benchmarks.gpu_ops.row import Run
from benchmarks.peers import UnavailableError
from lora_kernels.ops import _ledger

BACKENDS = ("triton", "cuda")
FLOOR = "aten"
NO_GPU = 3
SEARCHES: dict[str, Any] = {m.OP: m for m in (tile_search, tile_search_packed)}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", required=True, choices=list(ROWS))
    parser.add_argument("--from", dest="record", type=Path, help="a record of gpu-check")
    parser.add_argument("--out", type=Path, help="folder; default: tuned/ of the op")
    parser.add_argument("--seconds", type=float, default=300.0, help="for the search of tiles")
    options = parser.parse_args(argv)
    if options.seconds < 0:
        parser.error("argument --seconds: accepted: 0 (no search) or more")
    options.out = options.out or _ledger.folder(options.op)
    return options


def directions(op: str) -> tuple[str, ...]:
    """What is judged apart: an op's two directions; of a pair of ops, for what it is chosen."""
    return ROWS[op].modes if op in _ledger.PAIRS else _ledger.DIRECTIONS


def entries(
    rows: list[dict[str, Any]], modes: tuple[str, ...] = _ledger.DIRECTIONS
) -> list[dict[str, Any]]:
    """Times of `aten` and of the kernels, per problem as evidence tells it, and direction."""
    made: dict[str, dict[str, Any]] = {}
    backends = (FLOOR, *BACKENDS)
    for r in rows:
        backend = r["provider"].removesuffix("-fp32")
        if r["skipped"] or r["mode"] not in modes or backend not in backends:
            continue
        told = {"sizes": r["sizes"], "kind": r["kind"], "direction": r["mode"]}
        entry = made.setdefault(json.dumps(told, sort_keys=True), {**told, "ms": {}})
        entry["ms"][backend] = r["median_ms"]
    return [e for e in made.values() if FLOOR in e["ms"] and len(e["ms"]) > 1]


def table(record: dict[str, Any], op: str, configs: list[dict[str, Any]]) -> dict[str, Any]:
    """The file's content, from a record and the tiles that it was measured with."""
    device = {k: record["device"][k] for k in ("type", "name", "architecture")}
    return {
        "schema": _ledger.SCHEMA,
        "op": op,
        "device": device,
        "torch": record["torch"],
        "triton": record["triton"],
        "date": record["date"],
        "commit": record["commit"],
        "command": record["command"],
        "backends": {
            b: {"verdict": k["verdict"], "digest": record["digests"][op][b]}
            for b, k in record["kernels"][op].items()
            if b in BACKENDS
        },
        "entries": entries([r for r in record["rows"] if r["op"] == op], directions(op)),
        "configs": configs,
    }


def write(made: dict[str, Any], folder: Path) -> Path:
    """Checked by the reader first: what is written can be read."""
    _ledger.parse(made, made["op"])
    path = folder / f"{records.slug(made['device'])}.json"
    records.save(path, made)
    return path


def kept_configs(device: dict[str, Any], folder: Path, op: str) -> list[dict[str, Any]]:
    """The tiles in the file of that device, none where there is no such file or it is broken."""
    path = folder / f"{records.slug(device)}.json"
    try:
        return list(_ledger.parse(json.loads(path.read_text(encoding="utf-8")), op).configs)
    except (OSError, ValueError):
        return []


def derive(options: argparse.Namespace) -> int:
    try:
        record = json.loads(options.record.read_text(encoding="utf-8"))
        if record.get("op") != "gpu_check":
            raise ValueError(f"op={record.get('op')!r}, accepted: a record of gpu-check")
        kept = kept_configs(record["device"], options.out, options.op)
        made = table(record, options.op, kept)
        path = write(made, options.out)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        print(f"tune: {options.record} is not usable: {text}", file=sys.stderr)
        return 2
    print(f"{path.name}: {len(made['entries'])} measurements, from {options.record.name}")
    return 0


def verdicts(rows: list[dict[str, Any]], op: str) -> dict[str, dict[str, Any]]:
    """From the benchmark's gate alone, which a failed check on the same sources overrules."""
    made = {}
    for backend in ROWS[op].gpu_backends():
        mine = [r for r in rows if r["provider"] in (backend, f"{backend}-fp32")]
        wrong = any((r["skipped"] or "").startswith(("WRONG", "FAILED")) for r in mine)
        ran = any(not r["skipped"] for r in mine)
        made[backend] = {"verdict": "failed" if wrong else "passed" if ran else "not run"}
    return made


def overrule(
    made: dict[str, dict[str, Any]], record: dict[str, Any], op: str, results: Path
) -> None:
    """A record of gpu-check of this device and these digests that failed a backend stands."""
    for path in sorted((results / records.slug(record["device"])).glob("*.json")):
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if earlier["op"] != "gpu_check":
                continue
            for backend, own in made.items():
                same = earlier["digests"][op][backend] == record["digests"][op][backend]
                if same and earlier["kernels"][op][backend]["verdict"] == "failed":
                    own["verdict"] = "failed"
        except (OSError, ValueError, KeyError, TypeError):
            continue


def measure(argv: list[str], options: argparse.Namespace, device: dict[str, Any]) -> int:
    op, timed = options.op, gpu.device_clock()
    until = time.monotonic() + options.seconds
    configs = kept_configs(device, options.out, op)
    tiles = SEARCHES.get(op)
    if tiles is not None and options.seconds > 0:
        configs = tiles.search(timed, until, say=lambda line: print(line, flush=True))
    run = Run(gpu.ceilings(timed), timed, rounds=10, modes=directions(op))
    kernels = (FLOOR, *ROWS[op].gpu_backends())
    names = tuple(n for n in ROWS[op].providers() if n.removesuffix("-fp32") in kernels)
    names = (*(n for n in ("frozen",) if n in ROWS[op].providers()), *names)
    record: dict[str, Any] = {
        **machine.describe("benchmarks.tune", argv, device),
        "triton": machine.version("triton"),
        "rows": [],
    }
    with nullcontext() if tiles is None else tiles.installed(configs):
        own = {b: _ledger.digest(op, b, tuple(configs)) for b in ROWS[op].gpu_backends()}
        record["digests"] = {op: own}
        deadline = time.monotonic() + 240.0
        for number in range(ROWS[op].count()):
            if time.monotonic() >= deadline:
                print(f"no time left for case {number + 1} of {ROWS[op].count()}", flush=True)
                break
            for row in ROWS[op].bench(number, names, run):
                record["rows"].append(row)
                print(gpu_report.line(row), flush=True)
    record["kernels"] = {op: verdicts(record["rows"], op)}
    overrule(record["kernels"][op], record, op, records.RESULTS)
    made = table(record, op, configs)
    if not made["entries"]:
        print("tune: no kernel could be timed beside aten; nothing was written", file=sys.stderr)
        return 1
    path = write(made, options.out)
    print(f"{path.name}: {len(made['entries'])} measurements, {len(configs)} tuned tiles")
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.record is not None:
        return derive(options)
    try:
        device = machine.gpu()
    except UnavailableError as error:
        print(f"tune: {error}; nothing was measured and nothing was written", file=sys.stderr)
        return NO_GPU
    return measure(argv, options, device)


if __name__ == "__main__":
    sys.exit(main())
