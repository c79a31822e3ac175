"""transformers.Trainer with fused adapters and a clock. The loop stays theirs."""

from __future__ import annotations

from typing import Any

import torch
import transformers

import lora_kernels as lk
from lora_kernels.errors import ConfigError
from lora_kernels.training.callbacks import StepTimer
from lora_kernels.training.checkpointed_trainer import CheckpointedTrainer


class LoRATrainer(CheckpointedTrainer):
    """A ``transformers.Trainer`` whose PEFT model runs on lora_kernels.

    Takes every argument of ``transformers.Trainer``, and:

    Args:
        kernels: call :func:`lora_kernels.apply` on the model, its loss included; False leaves it as
            PEFT built it.
        loraplus_ratio: B learns this many times faster than A (LoRA+, Hayou et al., 2024); None:
            equally fast.

    Attributes:
        kernel_report: what `apply` did to each layer, or None without kernels.
        step_seconds: duration of each optimizer step so far, data loading excluded.
        evaluated: the features of the evaluation that runs or ran last.

    Raises:
        LoraKernelsError: as :func:`lora_kernels.apply`.
        ConfigError: `loraplus_ratio` for a model without B matrices.
    """

    def __init__(
        self,
        *args: Any,
        kernels: bool = True,
        loraplus_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        assert self.model is not None  # the base class refuses to be built without one
        self.kernel_report = lk.apply(self.model, fused_loss=True) if kernels else None
        self.loraplus_ratio = loraplus_ratio
        self.evaluated: Any = self.eval_dataset
        self._examples = 0
        self._tokens = torch.zeros((), dtype=torch.int64)
        self._timer = StepTimer()
        self.add_callback(self._timer)

    @property
    def step_seconds(self) -> list[float]:
        return self._timer.seconds

    @property
    def seen(self) -> tuple[int, int]:
        """Rows and tokens of the training so far on this process, without what a mask hides."""
        return self._examples, int(self._tokens)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids = inputs.get("input_ids") if hasattr(inputs, "get") else None
        if ids is not None:
            self._examples += len(ids)
            mask = inputs.get("attention_mask")
            whole = mask is None or mask.dim() != 2
            # Summed where the batch lies: no wait for the device.
            count = torch.as_tensor(ids.numel()) if whole else mask.sum()
            self._tokens = self._tokens.to(count.device) + count
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.evaluated = self.eval_dataset if eval_dataset is None else eval_dataset
        return super().evaluate(eval_dataset, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.loraplus_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        if self.optimizer_cls_and_kwargs is not None:
            cls, kwargs = self.optimizer_cls_and_kwargs
        else:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
        rate = kwargs.get("lr", self.args.learning_rate)
        decayed = set(self.get_decay_parameter_names(model))
        self.optimizer = cls(
            loraplus_groups(model, rate, self.loraplus_ratio, self.args.weight_decay, decayed),
            **kwargs,
        )
        return self.optimizer


class GeneratingTrainer(LoRATrainer, transformers.Seq2SeqTrainer):
    """A LoRATrainer whose evaluation writes answers, as ``transformers.Seq2SeqTrainer`` does."""


def loraplus_groups(
    model: Any, rate: float, ratio: float, weight_decay: float, decayed: set[str]
) -> list[dict[str, Any]]:
    """Parameter groups in which B matrices have `ratio` times the learning rate.

    Args:
        decayed: names of the parameters that weight decay touches.

    Raises:
        ConfigError: no trainable B.
    """
    groups: dict[tuple[bool, bool], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            second = ".lora_B." in f".{name}." or ".lora_embedding_B." in f".{name}."
            groups.setdefault((second, name in decayed), []).append(parameter)
    if not any(second for second, _ in groups):
        raise ConfigError(
            "train.loraplus_ratio needs trainable lora_B matrices; the model has none"
        )
    return [
        {
            "params": parameters,
            "lr": rate * ratio if second else rate,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (second, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
