"""Peak of the resident set in a training step: PEFT against lora_kernels.

    python -m benchmarks.peak_memory [--dtype bf16] [--batch 4] [--sequence 256] [--layers 30]
        [--rank 16] [--dropout 0.1] [--json OUT]

A SmolLM2-shaped Llama, all linears adapted: forward, loss, backward, AdamW on the adapters. Every
provider has a process of its own. It takes a step to warm up (packed weights, optimizer state, code
pages), resets the high-water mark, and takes two more. Reported: the mark, and what it is above
the resident set of the same process before it built the model. Every larger tensor has its own
mapping, so that freed memory leaves the resident set at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine, record
from benchmarks.activation_memory import build
from benchmarks.memory import reset_high_water_mark, resident_bytes
from benchmarks.options import model_parser
from benchmarks.smollm2_step import LAYERS, Trainer, batches

_LOSS = {"apply": {"fused_loss": True}}
_ALL = {"apply": {"fused_loss": True, "recompute_activations": True}}
PROVIDERS: dict[str, dict[str, Any]] = {
    "PEFT": {},
    "lora_kernels": {"apply": {}},
    "lora_kernels, fused loss": _LOSS,
    "lora_kernels, fused loss, recompute_activations": _ALL,
    "PEFT, checkpointing": {"checkpoint": True},
    "lora_kernels, checkpointing": {"apply": {}, "checkpoint": True},
    "lora_kernels, fused loss, checkpointing": {**_LOSS, "checkpoint": True},
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """In the child: bytes of this process."""
    before = resident_bytes("VmRSS")
    model = build(options, options.layers, PROVIDERS[options.provider])
    trainer = Trainer(model, batches(options, 3))
    trainer.step()
    gc.collect()
    reset_high_water_mark()
    for _ in range(2):
        trainer.step()
    peak = resident_bytes("VmHWM")
    return {
        "peak_bytes": peak, "above_libraries_bytes": peak - before,
        "resident_between_steps_bytes": resident_bytes("VmRSS"), "losses": trainer.losses,
    }  # fmt: skip


def in_child(provider: str, options: argparse.Namespace) -> dict[str, Any]:
    settings = ("dtype", "batch", "sequence", "layers", "rank", "dropout")
    command = [sys.executable, "-m", "benchmarks.peak_memory", "--provider", provider]
    command += [word for s in settings for word in (f"--{s}", str(getattr(options, s)))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{provider}: the process ended with {done.returncode}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = model_parser("peak_memory", batch=4, sequence=256, layers=LAYERS, rank=16)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--provider", choices=list(PROVIDERS), help="only this, in this process")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if not Path("/proc/self/clear_refs").exists():
        print("peak_memory: this system has no /proc/self/clear_refs", file=sys.stderr)
        return 1
    if options.provider:
        print(json.dumps(measure(options)))
        return 0
    head = machine.describe("benchmarks.peak_memory", argv)
    rows: list[dict[str, Any]] = []
    for provider in PROVIDERS:
        rows.append({"provider": provider, **in_child(provider, options)})
        n, first = (row["above_libraries_bytes"] for row in (rows[-1], rows[0]))
        print(f"{provider:48} {n / 2**20:8.0f} MiB  {n / first:5.2f} of PEFT", flush=True)
    result: dict[str, Any] = {
        "schema": record.SCHEMA, "op": "peak_memory", **head, "dtype": options.dtype,
        "batch": options.batch, "sequence": options.sequence, "layers": options.layers,
        "rank": options.rank, "dropout": options.dropout, "rows": rows,
    }  # fmt: skip
    record.keep(result, options.json, f"peak_memory-{options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
