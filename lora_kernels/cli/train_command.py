"""`lora-kernels train CONFIG.yaml [KEY=VALUE ...]`."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout

from lora_kernels.training.config_table import help_text

NAME = "train"
SUMMARY = "fine-tune a model as a YAML file says"
DESCRIPTION = """\
Fine-tunes a model for classification, language modelling, translation,
summarisation, question answering or labelling words. Writes what trained (an
adapter in PEFT's format, unless the method says otherwise), report.json,
report.md, log.jsonl and pictures into the folder `output` of the
configuration; the folder appears when everything is done. Prints a table at
the end.

Exit codes: 0 done; 2 the message says what is wrong, and nothing was written;
75 stopped by a signal, resume=auto goes on from the checkpoint; 130
interrupted."""
EXAMPLES = """\
examples:
  lora-kernels train examples/bbc_news.yaml
  lora-kernels train my.yaml data.path=reviews.csv data.label=stars
  lora-kernels train my.yaml lora.r=8 train.epochs=2 output=runs/r8
  lora-kernels train my.yaml method=qlora train.keep_best=true
  lora-kernels train my.yaml train.save_steps=100 resume=auto

""" + help_text(74)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the configuration file")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="values that replace those of the file"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON, no table")
    parser.add_argument("--quiet", action="store_true", help="no progress bars and notes")


def run(arguments: argparse.Namespace) -> int:
    from lora_kernels.training import finetune
    from lora_kernels.training.allocator import keep_freed_pages
    from lora_kernels.training.processes import is_main

    keep_freed_pages()
    with redirect_stdout(sys.stderr):  # trackers print; the result alone belongs to stdout
        result = finetune(arguments.config, arguments.overrides, quiet=arguments.quiet)
    if not is_main():
        return 0
    if arguments.json:
        print(json.dumps(result.report, indent=2, ensure_ascii=False))
        return 0
    context = ' --context "a text"' if result.report["task"] == "question-answering" else ""
    print(f'\n{result}\ntry: lora-kernels predict {result.output} "some text"{context}')
    return 0
