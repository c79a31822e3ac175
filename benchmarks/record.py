"""Result records: one JSON file per run. The fields are described in results/README.md."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"


def write_atomically(path: Path, content: bytes) -> None:
    """To a temporary name in the same folder, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save(path: Path, record: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())


def slug(device: dict[str, Any]) -> str:
    """Folder name of a device."""
    words = [device["name"]]
    if device["type"] == "cpu":
        words += [*device["isa"][:1], f"{device['threads']}t"]
    return "-".join("".join(c if c.isalnum() else " " for c in " ".join(words)).lower().split())


def default_path(record: dict[str, Any]) -> Path:
    """results/<device>/<date>-<op>-<commit>.json"""
    day = record["date"][:10].replace("-", "")
    name = f"{day}-{record['op']}-{record['commit'] or 'uncommitted'}.json"
    return RESULTS / slug(record["device"]) / name


def keep(result: dict[str, Any], path: Path | None, name: str | None = None) -> None:
    """Save a record where the user says, else under its default path as `name` or its op."""
    path = path or default_path({**result, "op": name or result["op"]})
    save(path, result)
    print(f"record: {path}")


def newest(op: str, device: str = "cpu") -> Path:
    """The record of `op` on a kind of device with the latest date."""
    dated = []
    for path in RESULTS.rglob("*.json"):
        record = json.loads(path.read_text())
        if record.get("op") == op and record["device"]["type"] == device:
            dated.append((record["date"], path))
    if not dated:
        raise FileNotFoundError(
            f"no result of op={op!r} on {device} under benchmarks/results; measure first"
        )
    return max(dated)[1]


def shape_label(row: dict[str, Any]) -> str:
    return "×".join(str(n) for n in row["shape"])
