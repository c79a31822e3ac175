"""transformers models on quantized layers: :class:`QuantConfig` for ``from_pretrained``.

The first use of :class:`QuantConfig` registers it with transformers; importing this package, or
another module of it, does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lora_kernels.QuantConfig needs transformers, which is not installed; "
        "pip install 'lora-kernels[hf]'"
    ) from error

if TYPE_CHECKING:
    from lora_kernels.integrations.transformers.quant_config import QuantConfig as QuantConfig

__all__ = ["QuantConfig"]


def __getattr__(name: str) -> Any:
    if name != "QuantConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lora_kernels.integrations.transformers.quant_config import QuantConfig
    from lora_kernels.integrations.transformers.registration import register

    register()
    globals()[name] = QuantConfig
    return QuantConfig
