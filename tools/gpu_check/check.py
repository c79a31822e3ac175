"""Check and time the GPU kernels here; write one record.

    python3 -m tools.gpu_check [--part tests|sanitize|bench] [--results DIR] [--commit HASH]

Needs a GPU and a Python with torch and triton; no network, nothing is built. The package is
imported from the source tree; a compiled CUDA library that lies in it is used as it is. Parts may
be run one by one: their results meet in benchmarks/results/<device>/<date>-<commit>.json.

Exit codes: 0 nothing failed, 1 something did, 2 wrong arguments, 3 no GPU here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import gpu_report, machine
from benchmarks import record as records
from benchmarks.peers import UnavailableError
from lora_kernels.ops import _ledger
from tools.gpu_check import bench_part, parts, sanitize_part, test_part

NO_GPU = 3
# Seconds; with what starts and ends them the whole stays below ten minutes.
BUDGETS = {"tests": 200.0, "sanitize": 130.0, "bench": 240.0}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=parts.PARTS, help="default: all of them")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of records")
    parser.add_argument("--commit", default="", help="what is measured, where git does not know")
    options = parser.parse_args(argv)
    if options.commit and not options.commit.isalnum():
        parser.error("argument --commit: accepted: letters and digits")
    options.commit = options.commit[:12]
    return options


def head(argv: list[str], device: dict[str, Any], commit: str) -> dict[str, Any]:
    """The record before anything ran."""
    described = machine.describe("tools.gpu_check", argv, device, commit)
    return {
        "schema": records.SCHEMA, "op": "gpu_check", **described,
        "triton": machine.version("triton"),
        "digests": {op: _ledger.digests_here(op) for op in parts.covered()},
        "parts": {}, "kernels": {}, "ceilings": None, "rows": [],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    try:
        device = machine.gpu()
    except UnavailableError as error:
        print(f"gpu-check: {error}; nothing was checked and nothing was written", file=sys.stderr)
        return NO_GPU
    record = head(argv, device, options.commit)
    path = parts.path_of(record, options.results)
    print(gpu_report.subtitle(record), flush=True)
    for name in parts.PARTS:
        if options.part not in (None, name):
            continue
        print(f"== {name}, at most {BUDGETS[name]:.0f} s", flush=True)
        if name == "bench":
            entry, record["rows"], record["ceilings"] = bench_part.run(BUDGETS[name])
        else:
            entry = {"tests": test_part, "sanitize": sanitize_part}[name].run(BUDGETS[name])
        record["parts"][name] = entry
        made = parts.merge(record, path)  # after every part: a call that is cut off leaves them
        made["kernels"] = parts.verdicts(made)
        records.save(path, made)
    print(gpu_report.table(made))
    print(f"record: {path.name}")
    return 1 if any(p["status"] == "failed" for p in made["parts"].values()) else 0
