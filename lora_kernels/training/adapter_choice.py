"""Several adapters over one base model that is in memory once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lora_kernels.errors import AdapterFileError, ConfigError
from lora_kernels.training.adapted_model import adapter_source, base_path


class AdapterChoice:
    """Adapters of a PEFT model by the name of their folder; the first one is active.

    Args:
        model: a PeftModel with the adapter of `first`.
        first: folder of that adapter or of its run.
        base: what all adapters are used with; None insists that they name one base.

    Raises:
        ConfigError: `model` does not run on PEFT's layers.
    """

    def __init__(self, model: Any, first: str | Path, base: str | None = None) -> None:
        import peft

        if not isinstance(model, peft.PeftModel):
            raise ConfigError(
                f"{first} cannot share its base with other adapters: its layers are not PEFT's; "
                "accepted: adapters of the methods lora and dora"
            )
        self.model = model
        self._base = base
        self._shared = base_path(adapter_source(first, base).base)
        self._names = {str(first): str(model.active_adapter)}

    def add(self, folder: str | Path) -> None:
        """Loads one more adapter.

        Raises:
            AdapterFileError: damaged, or its shapes are of another model.
            ConfigError: it names another base, or is there already.
        """
        if str(folder) in self._names:
            raise ConfigError(f"{folder} is given twice")
        source = adapter_source(folder, self._base)
        if base_path(source.base) != self._shared:
            raise ConfigError(
                f"{folder} is for the base {source.base}, {next(iter(self._names))} for "
                f"{self._shared}; accepted: adapters of one base, or --base for all of them"
            )
        name = f"adapter_{len(self._names)}"
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*missing adapter keys.*")
                self.model.load_adapter(str(source.folder), adapter_name=name)
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, UserWarning) as e:
            reason = " ".join(str(e).split())[:200]
            raise AdapterFileError(
                f"{folder} is damaged or belongs to another model than {source.base}: {reason}"
            ) from None
        self.model.eval()
        self._names[str(folder)] = name

    def use(self, folder: str | Path) -> None:
        """Makes the adapter of `folder` the active one."""
        self.model.set_adapter(self._names[str(folder)])
