"""Which classes are RMS norms: a table, by module and name, so that no model is imported."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from lora_kernels.errors import InvalidArgumentError

# The dtype of a norm's result. The kinds differ where the weight has another dtype than x.
PROMOTED = "promoted"  # weight * n.to(x.dtype)
INPUT = "input"  # (weight * n).to(x.dtype)
WEIGHT = "weight"  # weight * n.to(weight.dtype), fp32 for a weight in fp32
RESULTS = (PROMOTED, INPUT, WEIGHT)


class Norm(NamedTuple):
    """One class of norm: ``x / sqrt(mean(x^2) + eps) * (offset + weight)`` over the last axis.

    eps: name of the attribute that holds it. offset: 1 where the weight is stored as the difference
    to 1. result: one of :data:`RESULTS`.
    """

    eps: str = "variance_epsilon"
    offset: float = 0.0
    result: str = PROMOTED


_FOLDERS: dict[Norm, tuple[str, ...]] = {
    Norm(): (
        "apertus Apertus", "arcee Arcee", "bitnet BitNet", "csm Csm", "cwm Cwm",
        "deepseek_v2 DeepseekV2", "deepseek_v3 DeepseekV3", "ernie4_5 Ernie4_5",
        "exaone4 Exaone4", "falcon_h1 FalconH1", "glm Glm", "glm4 Glm4", "glm4_moe Glm4Moe",
        "granite Granite", "granitemoe GraniteMoe", "idefics3 Idefics3", "jamba Jamba",
        "lfm2 Lfm2", "llama Llama", "minimax MiniMax", "ministral Ministral",
        "mistral Mistral", "mistral3 Mistral3", "mixtral Mixtral", "mllama MllamaText",
        "olmoe Olmoe", "phi3 Phi3", "qwen2 Qwen2", "qwen2_moe Qwen2Moe", "qwen3 Qwen3",
        "qwen3_moe Qwen3Moe", "seed_oss SeedOss", "smollm3 SmolLM3",
    ),
    Norm("eps", 1.0, INPUT): (
        "gemma Gemma", "gemma2 Gemma2", "gemma3 Gemma3", "qwen3_next Qwen3Next",
        "recurrent_gemma RecurrentGemma", "t5gemma T5Gemma", "vaultgemma VaultGemma",
    ),
    Norm(result=INPUT): ("flex_olmo FlexOlmo", "gpt_oss GptOss", "olmo2 Olmo2", "olmo3 Olmo3"),
}  # fmt: skip
_T5 = (
    "t5 T5", "mt5 MT5", "umt5 UMT5", "longt5 LongT5", "switch_transformers SwitchTransformers",
)  # fmt: skip


def _table() -> dict[tuple[str, str], Norm]:
    found = {("torch.nn.modules.normalization", "RMSNorm"): Norm("eps", 0.0, INPUT)}
    rows = [(norm, entry, "RMSNorm") for norm, entries in _FOLDERS.items() for entry in entries]
    rows += [(Norm(result=WEIGHT), entry, "LayerNorm") for entry in _T5]
    for norm, entry, ending in rows:
        folder, stem = entry.split()
        found[f"transformers.models.{folder}.modeling_{folder}", stem + ending] = norm
    return found


_rows = _table()


def row_of(cls: type) -> Norm | None:
    """The row of exactly this class."""
    return _rows.get((cls.__module__, cls.__qualname__))


def rows() -> dict[tuple[str, str], Norm]:
    """(module, class name) -> row, a copy."""
    return dict(_rows)


def register_norm(
    cls: type[nn.Module], *, eps: str = "variance_epsilon", offset: float = 0.0,
    result: str = PROMOTED, replace: bool = False,
) -> None:  # fmt: skip
    """Tell `lora_kernels.apply` that the forward of `cls` is a norm as :class:`Norm` says, of one
    tensor, with its weight ``[features]`` under the name ``weight``.

    Args:
        cls: the class of the norm, exactly.
        eps, offset, result: see :class:`Norm`.
        replace: a row that is there already is replaced.

    Raises:
        InvalidArgumentError: no class, an unknown result, or a class that has a row.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise InvalidArgumentError(f"cls is {cls!r}; accepted: a subclass of torch.nn.Module")
    if result not in RESULTS:
        raise InvalidArgumentError(f"result={result!r}; accepted: {', '.join(RESULTS)}")
    key = (cls.__module__, cls.__qualname__)
    if key in _rows and not replace:
        raise InvalidArgumentError(f"{cls.__qualname__} has a row already; pass replace=True")
    _rows[key] = Norm(eps, offset, result)
