"""A .gguf file as a plain model folder that everything else can load, train and save.

transformers reads the format, but marks the model as quantized, and then neither saves nor trains
it as usual. So the weights are unpacked once, into a folder of the cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_kernels.errors import ConfigError

SUFFIX = ".gguf"
_FORMAT = 1  # of the folder; another number makes old ones be written anew


def model_folder(path: str) -> str:
    """`path` itself, or for a .gguf file the folder of its unpacked weights (fp32).

    The folder is made on first use, in ``LORA_KERNELS_CACHE_DIR`` (``~/.cache/lora_kernels`` when
    that is not set), under another name until it is complete. It takes four bytes per parameter.

    Raises:
        ConfigError: the file cannot be read as a causal language model, or the package gguf is
            missing.
    """
    if not path.lower().endswith(SUFFIX):
        return path
    file = Path(path).absolute()
    folder = _cache() / "gguf" / f"{file.stem}-{_fingerprint(file)}"
    if (folder / "config.json").is_file():
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _unpack(file, stage)
        # Another process may have been quicker; its folder has the same content.
        with suppress(OSError):
            os.replace(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return str(folder)


def _cache() -> Path:
    given = os.environ.get("LORA_KERNELS_CACHE_DIR")
    return Path(given) if given else Path.home() / ".cache" / "lora_kernels"


def _fingerprint(file: Path) -> str:
    import transformers

    try:
        with file.open("rb") as opened:
            head = opened.read(1 << 20)
        size = file.stat().st_size
    except OSError as e:
        raise ConfigError(f"model={str(file)!r} cannot be read: {e.strerror or e}") from None
    text = f"{_FORMAT} {size} {transformers.__version__} ".encode()
    return hashlib.sha256(text + head).hexdigest()[:16]


def _unpack(file: Path, folder: Path) -> None:
    import torch
    import transformers

    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"model={str(file)!r} needs the package gguf, which is not installed; pip install gguf"
        ) from None
    options: dict[str, Any] = {"gguf_file": file.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), **options)
        packed = transformers.AutoModelForCausalLM.from_pretrained(
            str(file.parent), dtype=torch.float32, **options
        )
    except Exception as e:  # the readers of others raise whatever a damaged file makes them raise
        reason = " ".join(str(e).split())[:200]
        raise ConfigError(f"model={str(file)!r} cannot be read as a model: {reason}") from None
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(packed)(config)
    plain.load_state_dict(packed.state_dict())
    generation = getattr(packed, "generation_config", None)
    if generation is not None:
        plain.generation_config = generation
    tokenizer.save_pretrained(str(folder))
    plain.save_pretrained(str(folder))
