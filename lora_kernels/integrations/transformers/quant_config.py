"""The quantization_config of ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from lora_kernels.errors import InvalidArgumentError
from lora_kernels.modules.eligibility import check_hyperparameters
from lora_kernels.modules.quant_hints import hints_from_config, read_dtype
from lora_kernels.modules.quant_options import quant_options
from lora_kernels.ops.quant_linear import Hints

METHOD = "lora_kernels"
_FIELDS = (
    "format", "block_size", "double_quant", "quant_storage", "compute_dtype", "skip_modules",
    "r", "alpha", "dropout",
)  # fmt: skip
_DTYPES = ("quant_storage", "compute_dtype")


class QuantConfig(QuantizationConfigMixin):
    """``AutoModel.from_pretrained(name, quantization_config=lk.QuantConfig())``.

    A checkpoint of full precision is quantized as it is loaded. One that bitsandbytes (4 or 8 bit),
    GPTQ, AWQ or fp8 wrote is read as it is, without these packages; its own configuration then
    says how it is quantized. Either way the linear layers become :class:`lora_kernels.QuantLinear`.
    ``save_pretrained`` writes the tensors and the configuration of bitsandbytes (nf4, fp4, int8),
    GPTQ or AWQ (int4) or transformers' fp8 (fp8_block), which those load.

    Also an argument of :func:`lora_kernels.replace_modules`.

    Args:
        format, block_size, double_quant, quant_storage: as in :func:`lora_kernels.ops.quantize`;
            None is nf4 and its defaults. For a quantized checkpoint leave them out.
        compute_dtype: as in :class:`lora_kernels.QuantLinear`.
        skip_modules: names or endings of layers to leave dense. None: output head and tied layers,
            and those that the model keeps in fp32, which are always left.
        r, alpha, dropout: give every quantized layer an adapter (:class:`QuantLoRALinear`). None:
            none; PEFT or :func:`lora_kernels.replace_modules` can add one later.

    Raises:
        InvalidArgumentError: a value that is not supported, or that does not go with another.
    """

    def __init__(
        self,
        format: str | None = None,
        block_size: int | None = None,
        double_quant: bool | None = None,
        *,
        quant_storage: torch.dtype | str | None = None,
        compute_dtype: torch.dtype | str | None = None,
        skip_modules: list[str] | None = None,
        r: int | None = None,
        alpha: float = 32,
        dropout: float = 0.0,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format = format
        self.block_size = block_size
        self.double_quant = double_quant
        self.quant_storage = _dtype("quant_storage", quant_storage)
        self.compute_dtype = _dtype("compute_dtype", compute_dtype)
        self.skip_modules = skip_modules
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.checkpoint: dict[str, Any] | None = None
        quant_options(self)
        if r is not None:
            check_hyperparameters(r, alpha, dropout)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The inverse of :meth:`to_dict` where that gives our own method."""
        known = {k: v for k, v in config_dict.items() if k in _FIELDS}
        unknown = set(config_dict) - set(_FIELDS) - {"quant_method"}
        if unknown:
            raise InvalidArgumentError(
                f"quantization_config: {sorted(unknown)[0]!r} is unknown; accepted: "
                + ", ".join(_FIELDS)
            )
        config = cls(**known)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets: the configuration of whoever else can read the checkpoint."""
        if self.checkpoint is not None:
            return dict(self.checkpoint)
        name, size = self.format or "nf4", self.block_size
        skip = {"modules_to_not_convert": self.skip_modules} if self.skip_modules else {}
        if name in ("nf4", "fp4"):
            return {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "load_in_8bit": False,
                "bnb_4bit_quant_type": name,
                "bnb_4bit_use_double_quant": self.double_quant is not False,
                "bnb_4bit_compute_dtype": _name(self.compute_dtype or torch.float32),
                "bnb_4bit_quant_storage": _name(self.quant_storage or torch.uint8),
                "llm_int8_skip_modules": self.skip_modules,
            }
        if name == "int8":
            return {
                "quant_method": "bitsandbytes",
                "load_in_4bit": False,
                "load_in_8bit": True,
                "llm_int8_skip_modules": self.skip_modules,
            }
        if name in ("int4", "int4_awq"):
            common = {"bits": 4, "group_size": 128 if size is None else size, **skip}
            if name == "int4_awq":
                return {"quant_method": "awq", "version": "gemm", "zero_point": True, **common}
            gptq = {"desc_act": False, "sym": False, "checkpoint_format": "gptq_v2"}
            return {"quant_method": "gptq", **gptq, **common}
        if name == "fp8_block":
            block = 128 if size is None else size
            return {
                "quant_method": "fp8",
                "weight_block_size": [block, block],
                "activation_scheme": "dynamic",
                **skip,
            }
        own = {key: getattr(self, key) for key in _FIELDS}
        own = {k: _name(v) if k in _DTYPES and v is not None else v for k, v in own.items()}
        return {"quant_method": METHOD, **own}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def for_checkpoint(self, config: Mapping[str, Any]) -> QuantConfig:
        """This configuration for weights that are quantized as `config` says.

        Raises:
            InvalidArgumentError: an argument was given that the checkpoint decides.
            QuantizedWeightError: a method, width or version that is not read here.
        """
        hints_from_config(config)
        if config.get("quant_method") == METHOD:
            return QuantConfig.from_dict(dict(config))
        for name in ("format", "block_size", "double_quant", "quant_storage"):
            given = getattr(self, name)
            if given is not None:
                raise InvalidArgumentError(
                    f"{name}={given!r}, but the checkpoint is quantized already "
                    f"({config.get('quant_method', 'bitsandbytes')}); leave it out"
                )
        made = QuantConfig(
            compute_dtype=self.compute_dtype, skip_modules=self.skip_modules,
            r=self.r, alpha=self.alpha, dropout=self.dropout,
        )  # fmt: skip
        made.checkpoint = dict(config)
        return made

    def hints(self, dtype: torch.dtype) -> Hints:
        """How to read the checkpoint's weights, for a model of `dtype`."""
        return hints_from_config(
            self.checkpoint if self.checkpoint is not None else self.to_dict(), dtype
        )


def _dtype(argument: str, value: torch.dtype | str | None) -> torch.dtype | None:
    if value is None or isinstance(value, torch.dtype):
        return value
    found = {"uint8": torch.uint8, "int8": torch.int8}.get(value) or read_dtype(value)
    if found is None:
        raise InvalidArgumentError(f"{argument}={value!r}; accepted: a torch.dtype or its name")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
