"""`lora-kernels train CONFIG.yaml [KEY=VALUE ...]`."""

from __future__ import annotations

import argparse
import json

NAME = "train"
SUMMARY = "fine-tune a model as a YAML file says"
DESCRIPTION = """\
Fine-tunes a model with a LoRA adapter. Writes the adapter in PEFT's format, report.json,
report.md and loss.png into the folder `output` of the configuration; the folder appears when
everything is done. Prints a table at the end."""
EXAMPLES = """\
examples:
  lora-kernels train examples/bbc_news.yaml
  lora-kernels train my.yaml data.path=reviews.csv data.text=review data.label=stars
  lora-kernels train my.yaml lora.r=8 train.epochs=2 precision=fp32 output=runs/r8

keys: docs/training.md lists them all with their defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the configuration file")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="values that replace those of the file"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON, no table")
    parser.add_argument("--quiet", action="store_true", help="no progress bars and notes")


def run(arguments: argparse.Namespace) -> int:
    from lora_kernels.training import finetune

    result = finetune(arguments.config, arguments.overrides, quiet=arguments.quiet)
    if arguments.json:
        print(json.dumps(result.report, indent=2, ensure_ascii=False))
        return 0
    print(f'\n{result}\ntry: lora-kernels predict {result.output} "some text"')
    return 0
