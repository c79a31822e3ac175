"""A base model with an adapter from disk: what `generate` and `merge` work on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_kernels.errors import AdapterFileError, ConfigError, LoraKernelsError
from lora_kernels.modules import safetensors_file
from lora_kernels.training.quantized_base import method_of, reading_options
from lora_kernels.training.references import model_path

# PEFT's task types and transformers' classes for them.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "classifier.bias")
_RUN = "lora_kernels.json"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class AdapterSource:
    """An adapter's folder and what it says about its base.

    Attributes:
        base: reference of the base model.
        auto_class: transformers' class for the task.
        options: keywords of ``from_pretrained`` that the task needs (labels).
    """

    folder: Path
    base: str
    auto_class: str
    options: dict[str, Any]


def adapter_source(folder: str | Path, base: str | None = None) -> AdapterSource:
    """Reads what `folder`, an adapter in PEFT's format or the folder of a run, is for.

    Raises:
        AdapterFileError: no such adapter.
        ConfigError: it does not say what its base model is, and `base` does not either.
    """
    folder = Path(folder)
    if (folder / "adapter" / "adapter_config.json").is_file():
        folder = folder / "adapter"
    config = _read_json(folder / "adapter_config.json")
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            break
    else:
        raise AdapterFileError(f"{folder}: adapter_model.safetensors is missing")
    saved = _read_json(folder / _RUN) if (folder / _RUN).is_file() else {}
    base = base or saved.get("model") or config.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{folder} does not name its base model; give it with --base")
    task = config.get("task_type")
    options: dict[str, Any] = {}
    labels = saved.get("labels")
    if isinstance(labels, list):
        options = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {name: i for i, name in enumerate(labels)},
        }
    elif task in ("SEQ_CLS", "TOKEN_CLS"):
        options = _labels_of_head(folder)
    return AdapterSource(folder, str(base), _CLASSES.get(task or "", ""), options)


def _labels_of_head(folder: Path) -> dict[str, Any]:
    """The number of classes is the size of the head that was saved with the adapter."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return {}
    tensors, _ = safetensors_file.read_file(path)
    for key, tensor in tensors.items():
        if key.endswith(_HEADS):
            return {"num_labels": tensor.shape[0]}
    return {}


def base_path(reference: str) -> str:
    """What ``from_pretrained`` is given for `reference`.

    Raises:
        ConfigError: it can only be a path, and nothing is there.
    """
    from lora_kernels.training.gguf_folder import model_folder

    return model_folder(model_path("base", reference))


def load_base(path: str, auto_class: str, dtype: str | None, options: dict[str, Any]) -> Any:
    """The base model at `path`, without an adapter.

    Args:
        auto_class: a class of transformers; empty takes the one that the model's files name.
        dtype: one of :data:`DTYPES`; None keeps that of the files.

    Raises:
        ConfigError: `path` is no model that this class can load.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path)
        if not auto_class:
            names = config.architectures or []
            auto_class = next((n for n in names if hasattr(transformers, n)), "AutoModel")
        return getattr(transformers, auto_class).from_pretrained(
            path,
            dtype=getattr(torch, dtype) if dtype else "auto",
            **reading_options(config),
            **options,
        )
    except LoraKernelsError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        reason = lines[0] if lines else type(e).__name__
        raise ConfigError(f"base={path!r} cannot be loaded: {reason}") from None


def load_tokenizer(path: str) -> Any:
    """The tokenizer at `path`, a folder or a name on the hub.

    Raises:
        ConfigError: there is none.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as e:
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ConfigError(f"base={path!r}: no tokenizer can be loaded: {first}") from None


def load_adapted(
    source: AdapterSource, dtype: str | None = None, trainable: bool = False, dense: bool = False
) -> Any:
    """The PEFT model of `source`; parts that the file lacks are errors, not warnings.

    Args:
        dense: a base that is quantized becomes dense, with the values that its codes stand for.

    Raises:
        AdapterFileError: damaged, or for another model.
        ConfigError: the base model cannot be loaded.
    """
    import warnings

    import peft
    from safetensors import SafetensorError

    base = load_base(base_path(source.base), source.auto_class, dtype, dict(source.options))
    if dense and method_of(base.config):
        base = base.dequantize()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            return peft.PeftModel.from_pretrained(base, str(source.folder), is_trainable=trainable)
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, UserWarning) as e:
        reason = " ".join(str(e).split())[:200]
        raise AdapterFileError(
            f"{source.folder} is damaged or belongs to another model than {source.base}: {reason}"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterFileError(
            f"{path.parent}: no adapter; accepted: a folder with adapter_config.json"
        ) from None
    except (OSError, ValueError) as e:
        raise AdapterFileError(f"{path} cannot be read: {e}") from None
    if not isinstance(content, dict):
        raise AdapterFileError(f"{path} holds a {type(content).__name__}; accepted: an object")
    return content
