"""transformers.Trainer whose checkpoints are finished or ignored, and whose resumed runs are exact.

What the base class already restores: weights, optimizer, scheduler, position in the data, and the
states of Python's, numpy's and torch's random generators (the dropout seeds of our kernels are
drawn from torch's). What is added here, so that a resumed run equals one that was never stopped,
bit for bit:

- a checkpoint counts only once it is sealed (:mod:`lora_kernels.training.checkpoints`), and the
  older ones go after that, so at any moment one finished checkpoint is there;
- evaluation leaves the random generators as it found them: a resumed run does not repeat the
  evaluation that followed its checkpoint;
- where an epoch ends with an evaluation, a checkpoint due at its last step is written after it.

And so that a step means the same however it is divided: :mod:`lora_kernels.training.loss_scale`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import IntervalStrategy

from lora_kernels.errors import CheckpointError, LoraKernelsError
from lora_kernels.training.checkpoints import break_seal, last_complete, rotate, seal
from lora_kernels.training.loss_scale import divides_by_items
from lora_kernels.training.processes import check_strategy


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever draws random numbers inside, the generators are afterwards as they were before."""
    import numpy as np

    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


class AfterEvaluation(transformers.TrainerCallback):
    """Puts off a checkpoint that is due at the last step of an epoch until after its evaluation."""

    def __init__(self) -> None:
        self._due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        at_end = state.epoch is not None and float(state.epoch).is_integer()
        if control.should_save and at_end and args.eval_strategy == IntervalStrategy.EPOCH:
            self._due, control.should_save = True, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._due:
            self._due, control.should_save = False, True


class CheckpointedTrainer(transformers.Trainer):
    """A ``transformers.Trainer`` that can be killed at any moment; arguments as there.

    ``train(resume_from_checkpoint=checkpoints.to_resume(folder))`` continues. With
    ``resume_from_checkpoint=True`` the last finished checkpoint of ``args.output_dir`` is taken,
    and training begins anew where there is none.

    Raises:
        CheckpointError: a checkpoint cannot be written (a full disk, say); the message names the
            last one that was finished.
        ConfigError: FSDP or DeepSpeed was asked for and would not be used.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_strategy(self.accelerator, self.args)
        if self.model_accepts_loss_kwargs and not divides_by_items(self.model):
            self.model_accepts_loss_kwargs = False
        self.add_callback(AfterEvaluation())

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete(Path(str(self.args.output_dir)))
        if isinstance(resume_from_checkpoint, Path):
            resume_from_checkpoint = str(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with random_state_kept():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        runs = Path(self._get_output_dir(trial=trial))
        folder = runs / f"checkpoint-{self.state.global_step}"
        # The base class would remove the older ones while this one is not sealed yet.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        main = self.args.should_save
        try:
            if main:
                break_seal(folder)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if main:
                seal(folder)
                best = self.state.best_model_checkpoint
                rotate(runs, limit, Path(best) if best else None)
            self.accelerator.wait_for_everyone()
        except LoraKernelsError:
            raise
        except Exception as e:
            # torch and safetensors report a failed write as errors of their own kinds.
            reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
            earlier = last_complete(runs)
            left = f"the last finished one is {earlier}" if earlier else "there is no earlier one"
            raise CheckpointError(
                f"the checkpoint of step {self.state.global_step} cannot be written to {folder}: "
                f"{reason}; {left}"
            ) from e
        finally:
            self.args.save_total_limit = limit
