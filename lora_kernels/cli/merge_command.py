"""`lora-kernels merge ADAPTER OUTPUT`."""

from __future__ import annotations

import argparse
import json

NAME = "merge"
SUMMARY = "fold an adapter into its base model"
DESCRIPTION = """\
Writes the base model with the adapter folded into its weights: a folder that
from_pretrained loads without PEFT, or with --weights-only a safetensors file of
the changed weights alone. OUTPUT must not exist; it appears complete or not at
all. ADAPTER is a folder in PEFT's format or the folder of a run."""
EXAMPLES = """\
examples:
  lora-kernels merge runs/demo merged
  lora-kernels merge adapter merged --base ./SmolLM2-135M --dtype bfloat16
  lora-kernels merge runs/demo changed.safetensors --weights-only"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter or of a run")
    parser.add_argument("output", metavar="OUTPUT", help="new folder, or .safetensors file")
    parser.add_argument("--base", metavar="MODEL", help="base model; the adapter names it")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the written weights; when absent the base's",
    )
    parser.add_argument("--weights-only", action="store_true", help="the changed weights alone")
    parser.add_argument("--json", action="store_true", help="what was done, as JSON")


def run(arguments: argparse.Namespace) -> int:
    from lora_kernels.training.merging import merge_to_disk
    from lora_kernels.training.quiet import quiet_libraries

    with quiet_libraries():
        done = merge_to_disk(
            arguments.adapter,
            arguments.output,
            base=arguments.base,
            dtype=arguments.dtype,
            weights_only=arguments.weights_only,
        )
    if arguments.json:
        print(json.dumps(done, ensure_ascii=False))
    else:
        print(
            f"{done['layers']} tensors of {done['base']} changed; written: {done['output']} "
            f"({done['bytes'] / 2**20:.1f} MiB)"
        )
    return 0
