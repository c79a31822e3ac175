"""Answers of a finished run for new texts."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from lora_kernels.errors import AdapterFileError
from lora_kernels.training.finetuning import ADAPTER, SAVED
from lora_kernels.training.references import model_path
from lora_kernels.training.tasks import task_class


class Predictor:
    """A base model with the adapter of a run, on the kernels of this library.

    Args:
        folder: what :func:`finetune` wrote, or its ``adapter`` folder.
        kernels: fuse the adapters with :func:`lora_kernels.apply`.

    Raises:
        AdapterFileError: `folder` is no run, is damaged, or belongs to another model.
        ConfigError: the base model of the run is not on this machine.
    """

    def __init__(self, folder: str | Path, *, kernels: bool = True) -> None:
        adapter = _adapter_folder(Path(folder))
        saved = _read_saved(adapter / SAVED)
        self.task = task_class(str(saved.get("task"))).from_saved(saved)
        path = model_path("model", str(saved["model"]))

        import torch

        from lora_kernels.training.one_run import load_base, load_tokenizer
        from lora_kernels.training.quiet import quiet_libraries

        with quiet_libraries():
            self.tokenizer = load_tokenizer(path)
            base = load_base(self.task, path, str(saved["precision"]), self.tokenizer, {})
            self.model = _attach(base, adapter)
        self.model.eval()
        if torch.cuda.is_available():
            self.model.to("cuda")
        self.autocast = saved["precision"] == "bf16"
        if kernels:
            import lora_kernels as lk

            lk.apply(self.model)

    def __call__(self, texts: list[str]) -> list[dict[str, Any]]:
        """One answer per text; for classification ``{"label", "probability", "probabilities"}``."""
        import torch

        device = self.model.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            return self.task.predict(self.model, self.tokenizer, texts)


def _adapter_folder(folder: Path) -> Path:
    for candidate in (folder / ADAPTER, folder):
        if (candidate / SAVED).is_file():
            break
    else:
        raise AdapterFileError(
            f"{folder}: not the folder of a run; accepted: a folder written by lora-kernels train"
        )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (candidate / name).is_file():
            raise AdapterFileError(f"{candidate}: {name} is missing; train again")
    return candidate


def _read_saved(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise AdapterFileError(f"{path} cannot be read: {e}") from None
    needed = ("task", "model", "precision")
    if not isinstance(saved, dict) or any(key not in saved for key in needed):
        raise AdapterFileError(f"{path}: accepted: an object with {', '.join(needed)}")
    return saved


def _attach(base: Any, adapter: Path) -> Any:
    """PEFT only warns about parts that a file lacks; here that is an error."""
    import peft
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            return peft.PeftModel.from_pretrained(base, str(adapter))
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, UserWarning) as e:
        reason = " ".join(str(e).split())[:200]
        raise AdapterFileError(
            f"{adapter} is damaged or belongs to another model: {reason}"
        ) from None
