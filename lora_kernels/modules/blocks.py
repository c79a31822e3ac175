"""Which layers of a model's blocks are called with one input: a table of classes and names.

A row says, for one class of block, the attribute names of the layers that its forward calls with
the same tensor. It is found by the class's module and name, so that no library is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from lora_kernels.errors import InvalidArgumentError


class Mlp(NamedTuple):
    """Attribute names of a block whose forward is ``dropout(down(act(gate(x)) * up(x)))``.

    up: empty: there is no factor, ``down(act(gate(x)))``. packed: gate holds gate and up, in this
    order. dropout: empty: none. inner_dropout: of the argument of down; empty: none.
    inside: the forward does more than that, in an order of its own; names may then be paths
    (``output.dense``), and the forward runs as it is (modules/deferred_mlp.py).
    """

    gate: str
    up: str
    down: str
    act: str
    packed: bool = False
    dropout: str = ""
    inner_dropout: str = ""
    inside: bool = False


@dataclass(frozen=True)
class Block:
    """One class of block.

    Attributes:
        groups: attribute names of layers that are called with one input, in calling order. A group
            of one name is a layer that already holds several projections.
        elsewhere: other groups where the block sits under one of these attribute names (a cross
            attention reads keys and values from another tensor than queries).
        mlp: the names that its forward is made of, where that is all it does.
    """

    groups: tuple[tuple[str, ...], ...]
    elsewhere: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = ()
    mlp: Mlp | None = None


QKV = (("q_proj", "k_proj", "v_proj"),)
GATE_UP = (("gate_proj", "up_proj"),)
_BERT = (("query", "key", "value"),)
_CROSS = (("key", "value"),)

_ATTENTION = Block(QKV)
_GATED = Block(GATE_UP, mlp=Mlp("gate_proj", "up_proj", "down_proj", "act_fn"))
_HF = "transformers.models"

# model folder -> class name -> row
_TABLE: dict[str, dict[str, Block]] = {
    "gpt2": {
        "GPT2Attention": Block((("c_attn",),)),
        "GPT2MLP": Block((), mlp=Mlp("c_fc", "", "c_proj", "act", dropout="dropout")),
    },
    "gpt_oss": {"GptOssAttention": _ATTENTION},
    "phi3": {
        "Phi3Attention": Block((("qkv_proj",),)),
        "Phi3MLP": Block(
            (("gate_up_proj",),), mlp=Mlp("gate_up_proj", "", "down_proj", "activation_fn", True)
        ),
    },
    "t5": {
        "T5Attention": Block((("q", "k", "v"),), (("EncDecAttention", (("k", "v"),)),)),
        "T5DenseGatedActDense": Block(
            (("wi_0", "wi_1"),), mlp=Mlp("wi_0", "wi_1", "wo", "act", inner_dropout="dropout")
        ),
        "T5DenseActDense": Block((), mlp=Mlp("wi", "", "wo", "act", inner_dropout="dropout")),
    },
    "vit": {
        "ViTAttention": _ATTENTION,
        "ViTMLP": Block((), mlp=Mlp("fc1", "", "fc2", "activation_fn")),
    },
    "whisper": {
        "WhisperAttention": Block(QKV, (("encoder_attn", (("k_proj", "v_proj"),)),)),
    },
}
_TABLE |= {
    folder: {f"{stem}SelfAttention": Block(_BERT), f"{stem}CrossAttention": Block(_CROSS)}
    for folder, stem in (
        ("bert", "Bert"), ("roberta", "Roberta"), ("xlm_roberta", "XLMRoberta"),
        ("camembert", "Camembert"), ("electra", "Electra"),
    )
}  # fmt: skip
_TABLE |= {
    folder: {f"{stem}Attention": _ATTENTION, f"{stem}MLP": _GATED}
    for folder, stem in (
        ("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"),
        ("gemma", "Gemma"), ("gemma2", "Gemma2"), ("gemma3", "Gemma3"), ("smollm3", "SmolLM3"),
        ("granite", "Granite"), ("olmo2", "Olmo2"),
    )
}  # fmt: skip

# Blocks of other classes are recognised by the names of their layers: (gate, up, down), up empty
# as above. Nothing about the forward is assumed.
_LAYERS = [
    ("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"), ("w1", "w3", "w2"),
    ("gate_up_proj", "", "down_proj"), ("up_proj", "", "down_proj"), ("fc1", "", "fc2"),
    ("Wi", "", "Wo"),
    ("c_fc", "", "c_proj"), ("wi", "", "wo"), ("lin1", "", "lin2"), ("linear1", "", "linear2"),
    ("dense_h_to_4h", "", "dense_4h_to_h"), ("fc_in", "", "fc_out"), ("ffn", "", "ffn_output"),
    ("intermediate_dense", "", "output_dense"), ("intermediate.dense", "", "output.dense"),
]  # fmt: skip
_PACKED = ("gate_up_proj", "Wi")
_ACTIVATIONS = (
    "act_fn", "act", "activation_fn", "activation", "intermediate_act_fn", "activation_function",
)  # fmt: skip

_rows: dict[tuple[str, str], Block] = {
    (f"{_HF}.{folder}.modeling_{folder}", name): row
    for folder, classes in _TABLE.items()
    for name, row in classes.items()
}


def rows() -> dict[tuple[str, str], Block]:
    """(module, class name) -> row, a copy."""
    return dict(_rows)


def register_block(
    cls: type[nn.Module], *groups: tuple[str, ...], mlp: Mlp | None = None, replace: bool = False
) -> None:
    """Tell `lora_kernels.apply` that the forward of `cls` calls these layers with one tensor each.

    Args:
        cls: the class of the block, exactly.
        groups: attribute names of layers, one tuple per shared input; two to eight names.
        mlp: names of an MLP in it; with ``inside=True`` nothing is assumed about the forward.
        replace: a row that is there already is replaced.

    Raises:
        InvalidArgumentError: no class, no names, or a class that has a row.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise InvalidArgumentError(f"cls is {cls!r}; accepted: a subclass of torch.nn.Module")
    key = (cls.__module__, cls.__qualname__)
    if key in _rows and not replace:
        raise InvalidArgumentError(f"{cls.__qualname__} has a row already; pass replace=True")
    for group in groups:
        names = isinstance(group, tuple) and all(isinstance(name, str) for name in group)
        if not names or not 2 <= len(set(group)) == len(group) <= 8:
            raise InvalidArgumentError(
                f"a group is {group!r}; accepted: a tuple of two to eight different names"
            )
    if mlp is not None and not (isinstance(mlp, Mlp) and all((mlp.gate, mlp.down, mlp.act))):
        raise InvalidArgumentError(f"mlp is {mlp!r}; accepted: an Mlp with gate, down and act")
    if not groups and mlp is None:
        raise InvalidArgumentError("groups is empty; name the layers that share an input")
    _rows[key] = Block(groups, mlp=mlp)


def row_of(cls: type) -> Block | None:
    """The row of exactly this class; fully_shard's subclass of it counts as the class."""
    if cls.__name__.startswith("FSDP") and cls.__bases__[0].__name__ == "FSDPModule":
        cls = cls.__bases__[-1]
    return _rows.get((cls.__module__, cls.__qualname__))


def groups_of(row: Block, path: str) -> tuple[tuple[str, ...], ...]:
    """The groups of a block that sits at `path` in its model."""
    last = path.rpartition(".")[2]
    return dict(row.elsewhere).get(last, row.groups)


def blocks_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Block]]:
    """(path, block, row) of every block in `model` that is in the table or recognised by names."""
    for name, module in model.named_modules():
        row = row_for(module)
        if row is not None:
            yield name, module, row


def row_for(block: nn.Module) -> Block | None:
    """The row of its class, with an MLP recognised by names where the row tells of none."""
    row = row_of(type(block))
    if row is not None and (row.mlp is not None or row.groups):
        return row
    mlp = _recognised(block)
    if mlp is None:
        return row
    return Block(((mlp.gate, mlp.up),) if mlp.up else (), mlp=mlp)


def _recognised(block: nn.Module) -> Mlp | None:
    """Of the names above, those that `block` has, if its first and last layer have adapters."""
    for gate, up, down in _LAYERS:
        if not all(_adapted(child(block, name)) for name in (gate, down)):
            continue
        if up and child(block, up) is None:
            continue
        prefix = gate[: gate.rfind(".") + 1]
        for act in _ACTIVATIONS:
            if child(block, prefix + act) is not None:
                return Mlp(gate, up, down, prefix + act, gate in _PACKED, inside=True)
    return None


def _adapted(layer: Any) -> bool:
    return hasattr(layer, "lora_A")


def child(block: nn.Module, path: str) -> Any:
    """The module at `path` below `block`; None where there is none."""
    found: Any = block
    for name in path.split("."):
        found = found._modules.get(name)
        if found is None:
            return None
    return found
