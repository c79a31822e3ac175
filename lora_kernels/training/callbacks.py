"""What a run watches while transformers.Trainer trains: time, progress, and an untimed start."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback, set_seed


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class StepTimer(TrainerCallback):
    """Seconds of each optimizer step: forward, backward and update of batches already loaded.

    Loading data, evaluating and saving fall between the steps and are not counted.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(_now() - self._start)


class WarmUp(TrainerCallback):
    """Untimed forward and backward passes before the first step; their gradients are discarded.

    They pay for what happens once: threads, library primitives, packed copies of frozen weights.
    The seed is set again afterwards, so the training itself is the same with and without.
    """

    def __init__(self, batch: dict[str, Any], passes: int = 2) -> None:
        self.batch = batch
        self.passes = passes

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        model.train()
        batch = {key: value.to(args.device) for key, value in self.batch.items()}
        for _ in range(self.passes):
            model(**batch).loss.backward()
        model.zero_grad()
        set_seed(args.seed)


class Progress(TrainerCallback):
    """A bar for the training with the latest loss; on a terminal one for each evaluation too."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._training: Any = None
        self._evaluation: Any = None

    def _bar(self, total: int, title: str, leave: bool) -> Any:
        from tqdm.auto import tqdm

        # A log file gets a line now and then, a terminal a smooth bar.
        interval = 0.2 if sys.stderr.isatty() else 10.0
        return tqdm(total=total, desc=title, leave=leave, mininterval=interval, ncols=90)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = self._bar(state.max_steps, self.title, leave=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training.update(1)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        if self._training is not None and logs and "loss" in logs:
            self._training.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training.close()
        self._training = None

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not sys.stderr.isatty():
            return
        if self._evaluation is None:
            self._evaluation = self._bar(len(eval_dataloader), "evaluation", leave=False)
        self._evaluation.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None
