"""`lora-kernels eval RUN [DATA]`."""

from __future__ import annotations

import argparse
import json

NAME = "eval"
SUMMARY = "score a finished run, on its test split or on other data"
DESCRIPTION = """\
Prints the metrics of a run's task. Without DATA the run's own test split is drawn
again, from its data and seed; with DATA every example of that file or folder is
scored. Columns are those of the run's configuration."""
EXAMPLES = """\
examples:
  lora-kernels eval runs/demo
  lora-kernels eval runs/demo other_reviews.csv --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a folder written by lora-kernels train")
    parser.add_argument("data", nargs="?", metavar="DATA", help="file or folder of examples")
    parser.add_argument("--limit", type=int, metavar="N", help="score about N examples of DATA")
    parser.add_argument("--batch-size", type=int, metavar="N", help="examples per step")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(arguments: argparse.Namespace) -> int:
    from lora_kernels.training.evaluation import evaluate_run

    found = evaluate_run(
        arguments.run_folder,
        arguments.data,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
    )
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return 0
    print(f"{found['task']}, {found['examples']} examples of {found['data']}")
    width = max(len(name) for name in found["metrics"])
    for name, value in found["metrics"].items():
        mark = "  <- the run's metric" if name == found["metric"] else ""
        print(f"  {name:<{width}}  {value:.4g}{mark}")
    return 0
