"""How to quantize a layer, from a format name or a configuration object."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.ops.quant_linear import FORMAT_NAMES, make_spec


class QuantOptions(Protocol):
    """What a configuration has to hold; :class:`lora_kernels.QuantConfig` does."""

    @property
    def format(self) -> str | None: ...
    @property
    def block_size(self) -> int | None: ...
    @property
    def double_quant(self) -> bool | None: ...
    @property
    def quant_storage(self) -> torch.dtype | None: ...
    @property
    def compute_dtype(self) -> torch.dtype | None: ...


_FIELDS = ("format", "block_size", "double_quant", "quant_storage", "compute_dtype")


def quant_options(quant: str | QuantOptions | None) -> dict[str, Any] | None:
    """Keywords of :meth:`QuantLinear.from_linear`; None for None. Checked.

    Raises:
        InvalidArgumentError: neither a format name nor an object with these attributes, or values
            that do not go together.
    """
    if quant is None:
        return None
    if isinstance(quant, str):
        options: dict[str, Any] = {"format": quant}
    elif all(hasattr(quant, name) for name in _FIELDS):
        options = {name: getattr(quant, name) for name in _FIELDS}
        options["format"] = options["format"] or "nf4"
    else:
        raise InvalidArgumentError(
            f"quant={quant!r}; accepted: None, {', '.join(FORMAT_NAMES)}, or a QuantConfig"
        )
    if options["format"] not in FORMAT_NAMES:
        raise InvalidArgumentError(
            f"quant={options['format']!r}; accepted: {', '.join(FORMAT_NAMES)}"
        )
    make_spec(
        (8, 8), torch.float32, options["format"], options.get("block_size"),
        options.get("double_quant"), options.get("quant_storage"),
    )  # fmt: skip
    return options
