"""SIGTERM and Ctrl-C end a training after the step that runs, with a checkpoint.

The first signal asks; a second one ends the process at once, as if nobody had listened. With
several processes every one of them is asked (torchrun and accelerate forward the signal), and they
agree on the step at which they stop.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from transformers.trainer_utils import IntervalStrategy

from lora_kernels.errors import TrainingInterruptedError
from lora_kernels.training.checkpoints import last_complete

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(transformers.TrainerCallback):
    """Saves and stops after a signal; add it to the Trainer and train inside :meth:`listening`."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._saves_at_epoch_end = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catches the signals inside; without effect in a thread other than the main one."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self._receive) for s in _SIGNALS}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = self.signal is None, signal.Signals(number)
        if not first:
            raise KeyboardInterrupt

    def _asked(self) -> bool:
        """Whether any process was asked to stop; every process gets the same answer."""
        asked = self.signal is not None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            flag = torch.tensor(int(asked), device=device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            asked = bool(flag.item())
        return asked

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked() and not control.should_training_stop:
            at_end = state.epoch is not None and float(state.epoch).is_integer()
            # The evaluation that ends an epoch belongs into the checkpoint.
            self._saves_at_epoch_end = at_end and args.eval_strategy == IntervalStrategy.EPOCH
            control.should_save = not self._saves_at_epoch_end
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._saves_at_epoch_end:
            control.should_save = control.should_training_stop = True

    def check(self, checkpoints: Path, state: Any) -> None:
        """After ``trainer.train()``: raises when a signal cut the training short.

        Raises:
            TrainingInterruptedError: with where the checkpoint is.
        """
        if self.signal is None or state.global_step >= state.max_steps:
            return
        saved = last_complete(checkpoints)
        where = f"checkpoint {saved}" if saved else "no checkpoint was due"
        raise TrainingInterruptedError(
            f"stopped by {self.signal.name} after step {state.global_step} of {state.max_steps}; "
            f"{where}"
        )
