"""What `auto` may pick on a GPU, from measurements on it: ops/<op>/tuned/<device>.json.

    python -m benchmarks.tune --op lora_linear                 search tiles, then measure (GPU)
    python -m benchmarks.tune --op lora_linear --from RECORD   take a record of gpu-check (no GPU)

The search tries the tiles of configs.py on the benchmark's problems, keeps those that are right
and quicker than the analytic default, and then times the backends with them. A verdict of the
full check (tests, sanitizer) comes from its record only: run `make gpu-check` after the search and
take its record with --from; the tiles that are there stay.

Exit codes: 0 written, 1 nothing could be measured, 2 wrong arguments or record, 3 no GPU here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import gpu, gpu_report, machine, tile_search
from benchmarks import record as records
from benchmarks.peers import UnavailableError
from lora_kernels.ops import _ledger

BACKENDS = ("triton", "cuda")
FLOOR = "aten"
NO_GPU = 3


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", required=True, choices=["lora_linear"])
    parser.add_argument("--from", dest="record", type=Path, help="a record of gpu-check")
    parser.add_argument("--out", type=Path, help="folder; default: tuned/ of the op")
    parser.add_argument("--seconds", type=float, default=300.0, help="for the search of tiles")
    options = parser.parse_args(argv)
    if options.seconds < 0:
        parser.error("argument --seconds: accepted: 0 (no search) or more")
    options.out = options.out or _ledger.folder(options.op)
    return options


def entries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Times of `aten` and of the kernels, per problem, direction and dtype of the adapter."""
    made = []
    timed = [r for r in rows if not r["skipped"] and r["mode"] in _ledger.DIRECTIONS]
    for case, mode in dict.fromkeys((gpu_report.case_of(r), r["mode"]) for r in timed):
        here = [r for r in timed if (gpu_report.case_of(r), r["mode"]) == (case, mode)]
        for suffix in ("", "-fp32"):
            names = {f"{b}{suffix}": b for b in (FLOOR, *BACKENDS)}
            ms = {names[r["provider"]]: r["median_ms"] for r in here if r["provider"] in names}
            if FLOOR not in ms or len(ms) == 1:
                continue
            first = here[0]
            made.append({
                "M": first["shape"][0], "K": first["shape"][1], "N": first["members"],
                "rank": [first["rank"]] * len(first["members"]), "dtype": first["dtype"],
                "adapter_dtype": "float32" if suffix else first["dtype"],
                "dropout": first["dropout"] > 0.0, "direction": mode, "ms": ms,
            })  # fmt: skip
    return made


def table(record: dict[str, Any], configs: list[dict[str, Any]]) -> dict[str, Any]:
    """The file's content, from a record and the tiles that it was measured with."""
    device = {k: record["device"][k] for k in ("type", "name", "architecture")}
    return {
        "schema": _ledger.SCHEMA,
        "op": "lora_linear",
        "device": device,
        "torch": record["torch"],
        "triton": record["triton"],
        "date": record["date"],
        "commit": record["commit"],
        "command": record["command"],
        "backends": {
            b: {"verdict": record["kernels"][b]["verdict"], "digest": record["digests"][b]}
            for b in BACKENDS
        },
        "entries": entries(record["rows"]),
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
        made = table(record, kept_configs(record["device"], options.out, options.op))
        path = write(made, options.out)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        print(f"tune: {options.record} is not usable: {text}", file=sys.stderr)
        return 2
    print(f"{path.name}: {len(made['entries'])} measurements, from {options.record.name}")
    return 0


def verdicts(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """From the benchmark's gate alone, which a failed check on the same sources overrules."""
    made = {}
    for backend in BACKENDS:
        mine = [r for r in rows if r["provider"] in (backend, f"{backend}-fp32")]
        wrong = any((r["skipped"] or "").startswith(("WRONG", "FAILED")) for r in mine)
        ran = any(not r["skipped"] for r in mine)
        made[backend] = {"verdict": "failed" if wrong else "passed" if ran else "not run"}
    return made


def overrule(made: dict[str, dict[str, Any]], record: dict[str, Any], results: Path) -> None:
    """A record of gpu-check of this device and these digests that failed a backend stands."""
    for path in sorted((results / records.slug(record["device"])).glob("*.json")):
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            if earlier["op"] != "gpu_check":
                continue
            for backend in BACKENDS:
                same = earlier["digests"][backend] == record["digests"][backend]
                if same and earlier["kernels"][backend]["verdict"] == "failed":
                    made[backend]["verdict"] = "failed"
        except (OSError, ValueError, KeyError, TypeError):
            continue


def measure(argv: list[str], options: argparse.Namespace, device: dict[str, Any]) -> int:
    timed = gpu.device_clock()
    until = time.monotonic() + options.seconds
    configs = kept_configs(device, options.out, options.op)
    if options.seconds > 0:
        configs = tile_search.search(timed, until, say=lambda line: print(line, flush=True))
    top = gpu.ceilings(timed)
    names = ["frozen", *(f"{b}{s}" for s in ("", "-fp32") for b in (FLOOR, *BACKENDS))]
    record = {
        **machine.describe("benchmarks.tune", argv, device),
        "triton": machine.version("triton"),
        "rows": [],
    }
    with tile_search.installed(configs):
        record["digests"] = {b: _ledger.digest(options.op, b, tuple(configs)) for b in BACKENDS}
        deadline = time.monotonic() + 240.0
        for row in gpu.run_all(gpu.CASES, names, _ledger.DIRECTIONS, top, timed, 10, deadline):
            record["rows"].append(row)
            print(gpu_report.line(row), flush=True)
    record["kernels"] = verdicts(record["rows"])
    overrule(record["kernels"], record, records.RESULTS)
    made = table(record, configs)
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
