"""State dicts of torchtune: ``layers.0.attn.q_proj.lora_a.weight`` and so on.

The decoder's modules have names of their own, and where rotary embeddings turn neighbouring
dimensions (Llama, Mistral, Gemma 2) the rows of query and key are ordered by pairs; transformers
orders them by halves. Row i of head h is p of pair q: ``2 q + p`` here, ``p width/2 + q`` there.
torchtune's own export leaves a DoRA magnitude in the order of pairs; here it moves with its rows.
Source: ``torchtune/models/convert_weights.py`` of https://github.com/pytorch/torchtune.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from lora_kernels.modules.adapter_formats.adapter import (
    MAGNITUDE,
    A,
    Adapter,
    B,
    Heads,
    check_pairs,
    make_config,
    reject,
)
from lora_kernels.modules.adapter_tensors import PREFIX

# Below ``layers.<n>.`` and ``model.layers.<n>.``; the head stands alone.
_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_BACK = {ours: theirs for theirs, ours in _MODULES.items()}
_HEAD = ("output", "lm_head")
_SUFFIXES = {".lora_a.weight": A, ".lora_b.weight": B, ".magnitude": MAGNITUDE}
_SUFFIXES_BACK = {ours: theirs for theirs, ours in _SUFFIXES.items()}


def recognised(names: Sequence[str]) -> bool:
    return any(name.endswith((".lora_a.weight", ".lora_b.weight")) for name in names)


def _layer(name: str, start: str, table: dict[str, str], new: str, path: object) -> str:
    found = re.fullmatch(rf"{re.escape(start)}layers\.(\d+)\.(.+)", name)
    if found is None or found.group(2) not in table:
        reject(
            path,
            f"layer {name!r} has no counterpart; accepted below {start}layers.<n>: "
            + ", ".join(table),
        )
    return f"{new}layers.{found.group(1)}.{table[found.group(2)]}"


def _reorder(tensor: Tensor, layer: str, heads: Heads | None, pairs: bool, path: object) -> Tensor:
    """Rows of query or key: from halves to `pairs`, or back."""
    kind = layer.rpartition(".")[2]
    if heads is None or kind not in ("q_proj", "k_proj"):
        return tensor
    count = heads.query if kind == "q_proj" else heads.key
    if tensor.shape[0] != count * heads.width or heads.width % 2:
        reject(
            path,
            f"layer {layer!r} has {tensor.shape[0]} rows, not {count} heads of {heads.width}; "
            "is it the right base model?",
        )
    split = (2, heads.width // 2) if pairs else (heads.width // 2, 2)
    view = tensor.reshape(count, *split, *tensor.shape[1:])
    return view.transpose(1, 2).reshape(tensor.shape).contiguous()


def from_torchtune(
    state: dict[str, Tensor],
    path: object,
    heads: Heads | None,
    alpha: float | None,
    config: dict | None,
) -> Adapter:
    """To PEFT's names and transformers' order of rows.

    Args:
        heads: of the base model; None where rotary embeddings turn halves (Qwen, Phi).
        alpha: needed without `config`.
        config: adapter_config.json beside the file.

    Raises:
        AdapterFileError: a layer that is not a decoder's linear layer, or a missing argument.
    """
    if alpha is None and config is None:
        reject(
            path, "no adapter_config.json lies beside it; give the alpha of the training (--alpha)"
        )
    tensors: dict[str, Tensor] = {}
    rules: dict[str, tuple[int, float]] = {}
    for key, tensor in state.items():
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
        if suffix is None:
            reject(path, f"tensor {key!r} is not an adapter's; accepted: {', '.join(_SUFFIXES)}")
        theirs = key.removesuffix(suffix)
        layer = _HEAD[1] if theirs == _HEAD[0] else _layer(theirs, "", _MODULES, "model.", path)
        if suffix != ".lora_a.weight":
            tensor = _reorder(tensor, layer, heads, False, path)
        else:
            rules[layer] = (tensor.shape[0], alpha or 1.0)
        tensors[f"{PREFIX}{layer}{_SUFFIXES[suffix]}"] = tensor
    if not rules:
        reject(path, "it has no pair of lora_a and lora_b")
    dora = any(key.endswith(MAGNITUDE) for key in tensors)
    if config is None or alpha is not None:
        config = make_config(rules, [], dora, base=None)
    elif "peft_type" not in config or not _same_names(config, rules):
        # torchtune's own configuration: rank and alpha, and targets under its own names.
        base = config.get("base_model_name_or_path")
        rules = {layer: (r, float(config["lora_alpha"])) for layer, (r, _) in rules.items()}
        config = make_config(rules, [], dora, base)
    adapter = Adapter(tensors, config)
    check_pairs(adapter, path)
    return adapter


def _same_names(config: dict, layers: dict[str, tuple[int, float]]) -> bool:
    """Whether the targets are transformers' names."""
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return True
    return isinstance(targets, list) and not {"output_proj", "w1", "w2", "w3", "output"} & {
        str(t).rpartition(".")[2] for t in targets
    }


def to_torchtune(adapter: Adapter, path: object, heads: Heads | None) -> dict[str, Tensor]:
    """From PEFT's names and transformers' order of rows.

    Raises:
        AdapterFileError: a tensor that a torchtune decoder has no place for.
    """
    others = adapter.others()
    if others:
        reject(path, f"tensor {next(iter(others))!r} has no place in a torchtune adapter")
    state: dict[str, Tensor] = {}
    for layer, factors in adapter.layers():
        theirs = _HEAD[0] if layer == _HEAD[1] else _layer(layer, "model.", _BACK, "", path)
        for suffix, tensor in factors.items():
            moved = tensor if suffix == A else _reorder(tensor, layer, heads, True, path)
            state[theirs + _SUFFIXES_BACK[suffix]] = moved
    if heads is None:
        adapter.notes.append("rows of query and key kept in their order (no heads were given)")
    return state
