"""Answers of a finished run for new texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_kernels.errors import AdapterFileError
from lora_kernels.training.config_checks import PEFT_METHODS
from lora_kernels.training.finetuning import ADAPTER, SAVED
from lora_kernels.training.methods import method_module
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
        method = method_module(str(saved.get("method", "lora")))
        for name in method.NEEDED_FILES:
            if not (adapter / name).is_file():
                raise AdapterFileError(f"{adapter}: {name} is missing; train again")
        self.task = task_class(str(saved.get("task"))).from_saved(saved)
        whole = saved.get("method") == "full"
        path = str(adapter) if whole else model_path("model", str(saved["model"]))

        import torch

        from lora_kernels.training.gguf_folder import model_folder
        from lora_kernels.training.loading import load_base, load_tokenizer
        from lora_kernels.training.precision import base_dtype
        from lora_kernels.training.quiet import quiet_libraries

        dtype = base_dtype(str(saved["precision"]), str(saved.get("method", "lora")))
        with quiet_libraries():
            named = model_folder(model_path("tokenizer", str(saved["tokenizer"])))
            self.tokenizer = load_tokenizer(named)
            base = load_base(self.task, model_folder(path), dtype, self.tokenizer, {})
            self.model = method.attach(base, adapter, saved)
        self.model.eval()
        if torch.cuda.is_available():
            self.model.to("cuda")
        self.autocast = saved["precision"] == "bf16"
        if kernels and saved.get("method", "lora") in PEFT_METHODS:
            import lora_kernels as lk

            lk.apply(self.model)

    def __call__(self, inputs: list[Any]) -> list[dict[str, Any]]:
        """One answer per input, as the task gives it.

        For classification ``{"label", "probability", "probabilities"}``. Inputs are texts, or for
        question-answering pairs of question and context.
        """
        import torch

        from lora_kernels.training.quiet import quiet_libraries

        device = self.model.device.type
        with quiet_libraries(), torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            return self.task.predict(self.model, self.tokenizer, inputs)


def _adapter_folder(folder: Path) -> Path:
    for candidate in (folder / ADAPTER, folder):
        if (candidate / SAVED).is_file():
            break
    else:
        raise AdapterFileError(
            f"{folder}: not the folder of a run; accepted: a folder written by lora-kernels train"
        )
    return candidate


def _read_saved(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise AdapterFileError(f"{path} cannot be read: {e}") from None
    needed = ("task", "model", "tokenizer", "precision")
    if not isinstance(saved, dict) or any(key not in saved for key in needed):
        raise AdapterFileError(f"{path}: accepted: an object with {', '.join(needed)}")
    return saved
