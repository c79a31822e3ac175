"""What of a model trains: one file per family of methods, each with prepare, save and attach.

``prepare(base, task, config) -> model`` makes it trainable, ``save(model, folder)`` writes what
trained, ``attach(base, folder, saved) -> model`` puts it back for prediction.
"""

from __future__ import annotations

import importlib
from typing import Any

from lora_kernels.errors import ConfigError

_METHODS = {
    "lora": "adapters",
    "dora": "adapters",
    "qlora": "quantized",
    "freeze": "partial",
    "bitfit": "partial",
    "full": "whole",
}


def method_module(name: str) -> Any:
    """The module of a method.

    Raises:
        ConfigError: no such method.
    """
    if name not in _METHODS:
        raise ConfigError(f"method={name!r} is not known; accepted: {', '.join(_METHODS)}")
    return importlib.import_module(f"lora_kernels.training.methods.{_METHODS[name]}")
