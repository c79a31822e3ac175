"""transformers.Trainer with fused adapters and a clock. The loop stays theirs."""

from __future__ import annotations

from typing import Any

import lora_kernels as lk
from lora_kernels.training.callbacks import StepTimer
from lora_kernels.training.checkpointed_trainer import CheckpointedTrainer


class LoRATrainer(CheckpointedTrainer):
    """A ``transformers.Trainer`` whose PEFT model runs on lora_kernels.

    Takes every argument of ``transformers.Trainer``, and:

    Args:
        kernels: call :func:`lora_kernels.apply` on the model; False leaves it as PEFT built it.

    Attributes:
        kernel_report: what `apply` did to each layer, or None without kernels.
        step_seconds: duration of each optimizer step so far, data loading excluded.

    Raises:
        LoraKernelsError: as :func:`lora_kernels.apply`.
    """

    def __init__(self, *args: Any, kernels: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.model is not None  # the base class refuses to be built without one
        self.kernel_report = lk.apply(self.model) if kernels else None
        self._timer = StepTimer()
        self.add_callback(self._timer)

    @property
    def step_seconds(self) -> list[float]:
        return self._timer.seconds
