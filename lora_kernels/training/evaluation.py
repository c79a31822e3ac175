"""The metrics of a finished run, on its own test split or on other data."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from lora_kernels.errors import AdapterFileError, DataError
from lora_kernels.training.atomic import MARKER
from lora_kernels.training.config_reader import read_config
from lora_kernels.training.predictor import Predictor
from lora_kernels.training.tasks import task_class


def evaluate_run(
    folder: str | Path,
    data: str | None = None,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Scores the run in `folder`.

    Args:
        folder: what :func:`finetune` wrote.
        data: a file or folder of examples as ``data.path`` takes it, all of which are scored; None
            takes the test split of the run, drawn again from its data and seed.
        limit: score about this many examples of `data`.
        batch_size: examples per step; None takes the run's.

    Returns:
        ``{"run", "task", "data", "examples", "metric", "metrics"}``; `metric` names the one that
        the run's report quotes.

    Raises:
        AdapterFileError: no run there.
        ConfigError: the data or the model of the run are not on this machine.
        DataError: `data` cannot be read, or has a class that the run does not know.
    """
    import transformers

    from lora_kernels.training.arguments import training_arguments
    from lora_kernels.training.one_run import _evaluate, _scorer
    from lora_kernels.training.precision import check_device
    from lora_kernels.training.quiet import quiet_libraries
    from lora_kernels.training.trainer import GeneratingTrainer, LoRATrainer

    folder = Path(folder)
    config = read_config(_saved_config(folder), _overrides(data, limit, batch_size))
    predictor = Predictor(folder)
    task = task_class(config.task).from_config(config)
    task.use_metric(config.metric)
    known = getattr(predictor.task, "labels", None)
    if known is not None:
        new = sorted(set(getattr(task, "labels", [])) - set(known))
        if new:
            raise DataError(f"{data}: class {new[0]!r} is not one of the run's: {', '.join(known)}")
        task.labels = known  # type: ignore[attr-defined]
    model, tokenizer = predictor.model, predictor.tokenizer
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with quiet_libraries(), tempfile.TemporaryDirectory() as scratch:
        task.prepare(base, tokenizer)
        features = task.dataset("test", tokenizer)
        if not features:
            raise DataError(f"{data or folder}: no example to score")
        precision = "bf16" if predictor.autocast else "fp32"
        arguments = training_arguments(
            config, task, precision, check_device(config.device), Path(scratch), evaluate=False
        )
        trainer = (GeneratingTrainer if task.generates else LoRATrainer)(
            model=model,
            args=arguments,
            eval_dataset=features,
            data_collator=task.collator(tokenizer, base),
            processing_class=tokenizer if task.generates else None,
            preprocess_logits_for_metrics=task.reduce_logits(),
            kernels=False,  # the predictor has fused them
        )
        trainer.compute_metrics = _scorer(task, trainer)
        trainer.remove_callback(transformers.PrinterCallback)
        metrics = _evaluate(trainer, task, features)
    return {
        "run": str(folder),
        "task": task.name,
        "data": data or f"{config.data.path} (test split)",
        "examples": len(features),
        "metric": task.metric,
        "metrics": metrics,
    }


def _saved_config(folder: Path) -> dict[str, Any]:
    path = folder / MARKER
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
    except FileNotFoundError:
        raise AdapterFileError(
            f"{folder}: has no {MARKER}; accepted: a folder written by lora-kernels train"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise AdapterFileError(f"{path} cannot be read: {e}") from None
    if not isinstance(config, dict):
        raise AdapterFileError(f"{path}: its config is no object")
    return {**config, "resume": None, "trackers": [], "compare_stock": False}


def _overrides(data: str | None, limit: int | None, batch_size: int | None) -> list[str]:
    found = []
    if data is not None:
        quoted = json.dumps(data)
        found += [f"data.path={quoted}", f"data.test={quoted}", f"data.validation={quoted}"]
    if limit is not None:
        found.append(f"data.limit={limit}")
    if batch_size is not None:
        found.append(f"train.eval_batch_size={batch_size}")
    return found
