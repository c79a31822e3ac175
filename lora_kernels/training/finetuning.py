"""The whole job: data in, adapter and report out."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lora_kernels.training.atomic import MARKER, check_output, staged_folder
from lora_kernels.training.config import Config
from lora_kernels.training.config_reader import read_config
from lora_kernels.training.references import model_path
from lora_kernels.training.result import Result
from lora_kernels.training.tasks import task_class

ADAPTER = "adapter"
SAVED = "lora_kernels.json"


def finetune(
    config: Config | Mapping[str, Any] | str | Path,
    overrides: Iterable[str] = (),
    *,
    quiet: bool = False,
) -> Result:
    """Fine-tunes a model as `config` says and writes ``config.output``.

    The folder holds ``adapter/`` (PEFT's format, the head included, plus ``lora_kernels.json``
    with what prediction needs), ``report.json``, ``report.md`` and ``loss.png``. It appears when
    everything is done; a run that fails leaves no trace.

    Args:
        config: a Config, nested dictionaries, or the path of a YAML file.
        overrides: ``"section.key=value"`` texts, applied last.
        quiet: no progress bars and notes on stderr.

    Returns:
        The report, the curves and where they lie; prints as a table.

    Raises:
        ConfigError: the configuration, the model or the output folder cannot be used.
        DataError: the data cannot be read or hold nothing to learn from.
    """
    config = read_config(config, overrides)
    output = Path(config.output).expanduser()
    check_output(output)
    task = task_class(config.task).from_config(config)
    model_path("model", config.model)

    # transformers, peft and matplotlib load here: mistakes above are told at once.
    from tqdm.auto import tqdm

    from lora_kernels.training.loss_plot import draw_losses
    from lora_kernels.training.model_card import model_card
    from lora_kernels.training.one_run import train_once
    from lora_kernels.training.precision import resolve_precision
    from lora_kernels.training.quiet import cpu_threads, quiet_libraries
    from lora_kernels.training.report import make_report, markdown
    from lora_kernels.training.stock_twin import StockTwin

    precision, why = resolve_precision(config.precision)
    if not quiet:
        sizes = ", ".join(f"{count} {name}" for name, count in task.sizes.items())
        for line in (*task.notes, sizes, f"{precision}: {why}"):
            tqdm.write(line, file=sys.stderr)
    with (
        staged_folder(output) as stage, tempfile.TemporaryDirectory() as temporary,
        cpu_threads(config.threads), quiet_libraries(), ExitStack() as stack,
    ):  # fmt: skip
        scratch, twin = Path(temporary), None
        if config.compare_stock:
            twin = stack.enter_context(StockTwin(config, precision, scratch / "twin"))
        adapter = stage / ADAPTER
        run = train_once(
            config, task, precision, kernels=config.kernels, folder=scratch / "trainer",
            save_to=adapter, quiet=quiet, turns=twin.turns if twin else None,
        )  # fmt: skip
        stock = twin.result() if twin else None
        saved = {
            "task": task.name,
            "model": config.model,
            "tokenizer": config.model,
            "precision": precision,
            **task.to_saved(),
        }
        report = make_report(config, task, precision, run, stock)
        _write_json(adapter / SAVED, saved)
        (adapter / "README.md").write_text(model_card(report), encoding="utf-8")
        (stage / "report.md").write_text(markdown(report), encoding="utf-8")
        draw_losses(stage / "loss.png", report)
        _write_json(stage / MARKER, report)
    return Result(output, report)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
