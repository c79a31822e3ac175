"""Which norm makes the input of which block: a table of the layers that hold both.

A wrong or missing row costs a product that nobody takes, or one that is not saved; whether S
belongs to a tensor is checked on every call.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lora_kernels.errors import InvalidArgumentError

Pairs = tuple[tuple[str, str], ...]
# (attribute of the norm, attribute of the block)
_PRE: Pairs = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
_SANDWICH: Pairs = (("input_layernorm", "self_attn"), ("pre_feedforward_layernorm", "mlp"))

# "model folder, stem of its classes" by what their decoder layers do
_DECODERS: dict[Pairs, tuple[str, ...]] = {
    _PRE: (
        "llama Llama", "mistral Mistral", "qwen2 Qwen2",
        "qwen3 Qwen3", "gemma Gemma", "smollm3 SmolLM3", "phi3 Phi3", "granite Granite",
        "gpt_oss GptOss",
    ),
    _SANDWICH: ("gemma2 Gemma2", "gemma3 Gemma3"),
}  # fmt: skip
_T5: Pairs = (("layer_norm", "SelfAttention"), ("layer_norm", "DenseReluDense"))

_rows: dict[tuple[str, str], Pairs] = {
    (f"transformers.models.{folder}.modeling_{folder}", f"{stem}DecoderLayer"): pairs
    for pairs, names in _DECODERS.items()
    for folder, stem in (name.split() for name in names)
}
for _part in ("SelfAttention", "FF"):
    _rows["transformers.models.t5.modeling_t5", f"T5Layer{_part}"] = _T5


def rows() -> dict[tuple[str, str], Pairs]:
    """(module, class name) -> pairs, a copy."""
    return dict(_rows)


def register_producer(cls: type[nn.Module], *pairs: tuple[str, str], replace: bool = False) -> None:
    """Tell `lora_kernels.apply` that the forward of `cls` calls a block with what a norm returned.

    Args:
        cls: the class that holds both, exactly.
        pairs: (attribute name of the norm, attribute name of the block or of a layer).
        replace: a row that is there already is replaced.

    Raises:
        InvalidArgumentError: no class, no pairs of names, or a class that has a row.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise InvalidArgumentError(f"cls is {cls!r}; accepted: a subclass of torch.nn.Module")
    if not pairs or any(
        not isinstance(p, tuple) or len(p) != 2 or not all(isinstance(n, str) for n in p)
        for p in pairs
    ):
        raise InvalidArgumentError(
            f"pairs is {pairs!r}; accepted: tuples of two attribute names, (norm, block)"
        )
    key = (cls.__module__, cls.__qualname__)
    if key in _rows and not replace:
        raise InvalidArgumentError(f"{cls.__qualname__} has a row already; pass replace=True")
    _rows[key] = pairs


def fed_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(path of the block, norm, block) of every pair of the table in `model`."""
    for path, module in model.named_modules():
        cls = type(module)
        if cls.__name__.startswith("FSDP") and cls.__bases__[0].__name__ == "FSDPModule":
            cls = cls.__bases__[-1]
        for norm_name, name in _rows.get((cls.__module__, cls.__qualname__), ()):
            norm, block = module._modules.get(norm_name), module._modules.get(name)
            if norm is not None and block is not None:
                yield f"{path}.{name}" if path else name, norm, block
