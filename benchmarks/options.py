"""Command lines of the benchmarks that run whole models."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def count(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def model_parser(module: str, **counts: int) -> argparse.ArgumentParser:
    """Options of ``python -m benchmarks.<module>``: the dtype, where to keep the record, and a
    number from 1 on for each of `counts`, with its default."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=count, default=default)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<device>/...")
    return parser
