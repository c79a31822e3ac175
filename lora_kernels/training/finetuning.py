"""The whole job: data in, adapter and report out."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_kernels.errors import ConfigError
from lora_kernels.training.atomic import MARKER, check_output
from lora_kernels.training.checkpoint_home import (
    checkpoint_folder,
    find_resumed,
    leave_home,
    open_home,
)
from lora_kernels.training.config import Config
from lora_kernels.training.config_reader import read_config
from lora_kernels.training.preflight import check_room
from lora_kernels.training.processes import (
    check_launcher,
    is_main,
    output_stage,
    world_size,
)
from lora_kernels.training.references import model_path
from lora_kernels.training.result import Result, finite
from lora_kernels.training.tasks import Task, task_class

ADAPTER = "adapter"
SAVED = "lora_kernels.json"


def finetune(
    config: Config | Mapping[str, Any] | str | Path,
    overrides: Iterable[str] = (),
    *,
    quiet: bool = False,
) -> Result:
    """Fine-tunes a model as `config` says and writes ``config.output``.

    The folder holds ``adapter/`` (what trained: in PEFT's format for the methods that add an
    adapter; plus ``lora_kernels.json`` with what prediction needs), ``report.json``,
    ``report.md``, ``log.jsonl`` and the pictures. It appears when everything is done. A run that
    fails leaves no trace, except finished checkpoints where ``train.save_steps`` asks for them.

    Args:
        config: a Config, nested dictionaries, or the path of a YAML file.
        overrides: ``"section.key=value"`` texts, applied last.
        quiet: no progress bars and notes on stderr.

    Returns:
        The report, the curves and where they lie; prints as a table.

    Raises:
        ConfigError: the configuration, the model or the output folder cannot be used.
        DataError: the data cannot be read or hold nothing to learn from.
        TrainingInterruptedError: SIGTERM or Ctrl-C stopped a run that writes checkpoints.
    """
    config = read_config(config, overrides)
    if config.compare_stock and world_size() > 1:
        raise ConfigError("compare_stock=True takes turns with one process; started: "
                          f"{world_size()}")  # fmt: skip
    quiet = quiet or not is_main()
    output = Path(config.output).expanduser()
    check_launcher()
    check_output(output)
    check_room("output", output, 0)
    task_type = task_class(config.task)
    resumed = find_resumed(config, output)
    task = task_type.from_config(config)
    task.use_metric(config.metric)
    model_path("model", config.model)

    # transformers, peft and matplotlib load here: mistakes above are told at once.
    from tqdm.auto import tqdm

    from lora_kernels.training.precision import check_device, resolve_precision
    from lora_kernels.training.quiet import cpu_threads, quiet_libraries
    from lora_kernels.training.trackers import check_trackers

    check_device(config.device)
    check_trackers(config.trackers)
    precision, why = resolve_precision(config.precision, config.device)
    if not quiet:
        sizes = ", ".join(f"{count} {name}" for name, count in task.sizes.items())
        for line in (*task.notes, sizes, f"{precision}: {why}"):
            tqdm.write(line, file=sys.stderr)
    with cpu_threads(config.threads), quiet_libraries():
        return _train(config, task, precision, output, resumed, quiet)


def _train(
    config: Config, task: Task, precision: str, output: Path, resumed: Path | None, quiet: bool
) -> Result:
    from lora_kernels.training.arguments import writes_checkpoints
    from lora_kernels.training.one_run import train_once
    from lora_kernels.training.report import make_report
    from lora_kernels.training.stock_twin import StockTwin

    with (
        output_stage(output) as stage, tempfile.TemporaryDirectory() as temporary,
        ExitStack() as stack,
    ):  # fmt: skip
        scratch, twin, home = Path(temporary), None, None
        if writes_checkpoints(config):
            home = open_home(config, output) if is_main() else checkpoint_folder(output)
            if is_main():
                stack.callback(leave_home, home)
        if config.compare_stock:
            twin = stack.enter_context(StockTwin(config, precision, scratch / "twin"))
        run = train_once(
            config, task, precision, kernels=config.kernels, folder=home or scratch / "trainer",
            save_to=stage / ADAPTER, quiet=quiet, turns=twin.turns if twin else None,
            resume_from=resumed,
        )  # fmt: skip
        stock = twin.result() if twin else None
        report = finite(make_report(config, task, precision, run, stock))
        if is_main():
            _write(stage, config, task, precision, report)
        if is_main() and home is not None and config.train.save_steps is not None:
            shutil.copytree(home, stage / "checkpoints", copy_function=_link)
    if home is not None and is_main():
        shutil.rmtree(home, ignore_errors=True)
    return Result(output, report)


def _write(stage: Path, config: Config, task: Task, precision: str, report: dict[str, Any]) -> None:
    """Everything in the folder of the run besides what trained, the log and the checkpoints."""
    from lora_kernels.training import confusion_plot, loss_plot, metric_plot
    from lora_kernels.training.model_card import model_card
    from lora_kernels.training.report_page import markdown

    adapter = stage / ADAPTER
    adapter.mkdir(exist_ok=True)
    saved = {
        "task": task.name,
        "model": config.model,
        "tokenizer": config.model,
        "method": config.method,
        "precision": precision,
        "lora": asdict(config.lora),
        "quant": asdict(config.quant),
        **task.to_saved(),
    }
    _write_json(adapter / SAVED, saved)
    (adapter / "README.md").write_text(model_card(report), encoding="utf-8")
    loss_plot.draw_losses(stage / "loss.png", report)
    metric_plot.draw_metrics(stage / "metrics.png", report)
    if report["confusion"] is not None:
        confusion_plot.draw_confusion(stage / "confusion.png", report["confusion"])
    (stage / "report.md").write_text(markdown(report), encoding="utf-8")
    _write_json(stage / MARKER, report)


def _link(source: str, target: str) -> None:
    """Checkpoints move within a file system: a second name costs nothing, where there is one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
