"""Memory of one training step, in a process of its own.

    python -m benchmarks.memory PROVIDER M K N RANK DTYPE DROPOUT

prints one JSON object: `peak_bytes`, the growth of the resident set's high-water mark during two
training steps once the operands are there (outputs, gradients, temporaries and a packed W count),
and `saved_bytes`, what the forward keeps for the backward beyond the parameters.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.providers import Case, UnavailableError, build


def resident_bytes(field: str) -> int:
    """Of this process: VmRSS now, VmHWM at most since `reset_high_water_mark`."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found, field
    return int(found[1]) * 1024


def reset_high_water_mark() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _warm_libraries(name: str, case: Case) -> None:
    """Code pages, thread pools and scratch of the library GEMMs, and a compiler's own memory,
    are not the step's. No copy of W is kept by this: the operands are other tensors."""
    build("frozen", case).fwdbwd()
    if name == "peft-compile":
        build(name, case).fwdbwd()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def saved_bytes(name: str, case: Case) -> int:
    provider = build(name, case)
    parameters = {t.data_ptr() for t in (*provider.leaves[1:], *provider.inputs.weights)}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in parameters:
            kept[t.data_ptr()] = max(kept.get(t.data_ptr(), 0), t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        provider.fwd()
    return sum(kept.values())


def peak_bytes(name: str, case: Case) -> int:
    _warm_libraries(name, case)
    provider = build(name, case)
    reset_high_water_mark()
    before = resident_bytes("VmRSS")
    for _ in range(2):
        provider.fwdbwd()
    return max(0, resident_bytes("VmHWM") - before)


def in_child(name: str, case: Case) -> dict[str, int | None]:
    """Both figures for a provider; None where this system cannot tell."""
    if not Path("/proc/self/clear_refs").exists():
        return {"peak_bytes": None, "saved_bytes": None}
    dtype = str(case.dtype).removeprefix("torch.")
    shape = [str(n) for n in (case.M, case.K, case.N, case.rank)]
    command = [sys.executable, "-m", "benchmarks.memory", name, *shape, dtype, str(case.dropout_p)]
    # Every tensor of its own mapping, so that freed memory leaves the resident set at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"peak_bytes": None, "saved_bytes": None}
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> int:
    name, *shape, dtype, dropout_p = argv
    case = Case(*(int(n) for n in shape), getattr(torch, dtype), float(dropout_p))
    try:
        peak, saved = peak_bytes(name, case), saved_bytes(name, case)
    except UnavailableError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({"peak_bytes": peak, "saved_bytes": saved}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
