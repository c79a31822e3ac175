"""Where the numbers of a training go while it runs."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lora_kernels.errors import ConfigError, LoraKernelsError
from lora_kernels.training.result import finite

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
LOG = "log.jsonl"


def check_trackers(names: list[str]) -> None:
    """Refuses a tracker whose package is not installed.

    Raises:
        ConfigError: with what to install.
    """
    for name in names:
        package = _PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"trackers={name!r} needs the package {package}, which is not installed; pip "
                f"install {package}, or leave it out: {LOG} is always written"
            )


def start_trackers(trainer: Any) -> None:
    """Opens what transformers logs to, so that a service that is out of reach is told now.

    Raises:
        ConfigError: with the tracker's own reason.
    """
    for callback, name in _services(trainer):
        try:
            callback.setup(trainer.args, trainer.state, trainer.model)
        except Exception as e:
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise ConfigError(
                f"trackers={name!r} does not start: {reason}; set it up, or leave it out: {LOG} is "
                "always written"
            ) from None


def finish_trackers(trainer: Any) -> None:
    """Ends what the evaluation after the training opened once more; wandb does so by itself."""
    for callback, name in _services(trainer):
        if name == "trackio":
            callback.on_train_end(trainer.args, trainer.state, trainer.control, trainer.model)


def _services(trainer: Any) -> list[tuple[Any, str]]:
    """transformers' callbacks for services, with our names."""
    names = {"WandbCallback": "wandb", "TrackioCallback": "trackio"}
    kinds = ((c, type(c).__name__) for c in trainer.callback_handler.callbacks)
    return [(callback, names[kind]) for callback, kind in kinds if kind in names]


def tensorboard(folder: Path) -> Any:
    """transformers' callback, writing to `folder`."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))


class JsonLog(TrainerCallback):
    """One JSON object per log entry; a resumed run begins with the entries before."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("w", encoding="utf-8") as file:
                file.writelines(_line(entry) for entry in state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(finite(entry), ensure_ascii=False) + "\n"


class StopAtNaN(TrainerCallback):
    """An adapter full of NaN helps nobody: the run ends as soon as the loss is not a number."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise LoraKernelsError(
                f"the training loss is {loss} at step {state.global_step}: it diverged; lower "
                "train.learning_rate, raise train.lr_warmup or set train.max_grad_norm"
            )
