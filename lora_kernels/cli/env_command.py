"""`lora-kernels env`, also `python -m lora_kernels`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any

NAME = "env"
SUMMARY = "what runs on this machine, and why not the rest"
DESCRIPTION = """\
Lists every op and backend with the reason where one is not available, runs a small self-check of
each available backend against an fp64 reference, and shows versions, build, CPU, GPU and the
environment variables that are set. Exit code 1 when something that should work does not."""
EXAMPLES = """\
examples:
  lora-kernels env
  lora-kernels env --json > environment.json"""

# Facts about the native module that are said in words of their own; the rest is its build.
_NATIVE_OWN = ("available", "isa", "machine_isas")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON, for scripts and bug reports")


def run(arguments: argparse.Namespace) -> int:
    from lora_kernels.environment import env

    facts = env()
    print(json.dumps(facts, indent=2) if arguments.json else as_text(facts))
    return 1 if facts["problems"] else 0


def as_text(facts: dict[str, Any]) -> str:
    """The dictionary of :func:`lora_kernels.env` as aligned lines."""
    cpu, native, system = facts["cpu"], facts["native"], facts["platform"]
    general = [
        ("lora_kernels", facts["lora_kernels"]),
        ("folder", system["folder"]),
        ("python", system["python"]),
        ("system", system["system"]),
        ("cpu", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads used"),
        ("cpu units", " ".join(cpu["units"]) or "none of avx2, avx512, amx"),
        ("gpu", _gpu(facts["gpu"])),
        ("native module", _native(native)),
        ("cuda library", _cuda(facts["cuda"])),
        ("packed weights", _packing(facts["packing"])),
    ]
    sections = [_table(general)]
    for op, answer in facts["ops"].items():
        rows = [("backend", "available", "self-check", "note")]
        rows += [
            (name, "yes" if b["available"] else "no", b["self_check"] or "-", b["reason"])
            for name, b in answer["backends"].items()
        ]
        choices = [
            (f"auto, {dtype}", f"{choice['backend']}: {choice['reason']}")
            for dtype, choice in answer["auto"].items()
        ]
        sections.append(f"{op}\n{_table(rows, '  ')}\n{_table(choices, '  ')}")
    packages = [(n, v or "not installed") for n, v in facts["packages"].items()]
    sections.append("packages\n" + _table(packages, "  "))
    variables: list[Sequence[str]] = list(facts["environment"].items())
    none = [["no LORA_KERNELS_* variable is set"]]
    sections.append("environment\n" + _table(variables or none, "  "))
    if facts["problems"]:
        sections.append("BROKEN\n" + "\n".join(f"  {line}" for line in facts["problems"]))
    else:
        sections.append("everything that is available works")
    return "\n\n".join(sections)


def _gpu(gpu: dict[str, Any]) -> str:
    if not gpu["devices"]:
        return f"none: {gpu['reason']}"
    return "; ".join(
        f"{d['name']}, {d['capability']}, {d['bytes'] / 2**30:.0f} GiB" for d in gpu["devices"]
    )


def _cuda(cuda: dict[str, Any]) -> str:
    if not cuda["available"]:
        return str(cuda["reason"])
    unable = [f"{d['name']}: {d['reason']}" for d in cuda["devices"] if d["reason"]]
    return "; ".join([cuda["build"], *unable])


def _native(native: dict[str, Any]) -> str:
    if not native["available"]:
        return native["reason"]
    built = [f"{key} {native[key]}" for key in native if key not in _NATIVE_OWN]
    used, machine = native["isa"], ", ".join(native["machine_isas"])
    return f"uses {used} (machine: {machine}); built with {', '.join(built)}"


def _packing(packing: dict[str, Any]) -> str:
    if packing["policy"] is None:
        return "unusable, see below"
    kept = f"{packing['bytes'] / 2**20:.1f} MiB kept now"
    budget = f", budget {packing['budget_bytes'] / 2**30:.1f} GiB"
    return f"policy {packing['policy']}{budget if packing['policy'] == 'auto' else ''}, {kept}"


def _table(rows: Iterable[Sequence[str]], indent: str = "") -> str:
    """Columns padded to their widest cell, the last one left as it is."""
    rows = [tuple(row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)]
        lines.append((indent + "  ".join([*cells, row[-1]])).rstrip())
    return "\n".join(lines)
