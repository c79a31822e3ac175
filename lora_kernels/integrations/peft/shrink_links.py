"""Who makes S = x A^T in a model: the norm or the activation in front of the layers, or they.

Norms are linked to the group of layers that they feed (modules/producers.py knows which), MLP
blocks are told whether their activation makes S of the last layer. Neither changes what the model
holds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from lora_kernels.integrations.peft.groups import (
    dropout_of,
    group_alone,
    is_adapted,
    put_together,
    shrink_reason,
    take_apart,
)
from lora_kernels.integrations.peft.mlp_blocks import SHRINK, FusedMlp, activation_kind
from lora_kernels.integrations.transformers.rms_norms import is_norm, look_at
from lora_kernels.modules.blocks import Mlp, blocks_of, child, row_for
from lora_kernels.modules.handed_shrink import Switch, reason_against
from lora_kernels.modules.layer_group import LayerGroup, fed_by, group_of
from lora_kernels.modules.lora_linear import LoRALinear
from lora_kernels.modules.producers import fed_blocks
from lora_kernels.modules.report import FUSED, STOCK

NORM, ACTIVATION = "norm_shrink", "activation_shrink"


class Links(NamedTuple):
    """(group, norm, switch) and (MLP block, switch) as they stood."""

    norms: list[tuple[LayerGroup, nn.Module, Switch]]
    blocks: list[tuple[nn.Module, Switch]]


def links_of(model: nn.Module) -> Links:
    norms, blocks = [], []
    for module in model.modules():
        group = fed_by(module)
        if group is not None:
            norms.append((group, module, group.shrink))
        if SHRINK in module.__dict__:
            blocks.append((module, module.__dict__[SHRINK]))
    return Links(norms, blocks)


def unlink(model: nn.Module) -> None:
    """Every layer makes its own S again."""
    for module in model.modules():
        module.__dict__.pop(SHRINK, None)
        group = fed_by(module)
        if group is not None:
            group.feed_from(None, False)
        group = group_of(module)
        if group is not None and len(group.members) == 1:
            take_apart(group)


def restore(model: nn.Module, links: Links) -> None:
    """Undo one :func:`link`."""
    unlink(model)
    for group, norm, switch in links.norms:
        if len(group.members) == 1:
            put_together(group)
        if group_of(group.members[0]) is group:
            group.feed_from(norm, switch)
    for block, switch in links.blocks:
        block.__dict__[SHRINK] = switch


def link(model: nn.Module, switch: Switch, fused_norms: bool) -> list[dict[str, Any]]:
    """Entries of the report; what an earlier call linked is undone. Groups are formed before."""
    unlink(model)
    entries = []
    for path, norm, block in fed_blocks(model):
        layers = _first_layers(path, block)
        if not layers:
            continue
        reason = _norm_reason(norm, layers, switch, fused_norms)
        if not reason:
            first = next(iter(layers.values()))
            group = group_of(first) or group_alone(path, first)
            group.feed_from(norm, switch)
            reason = _in_evaluation(layers)
            entries.append(_entry(NORM, path, layers, FUSED, reason))
        else:
            entries.append(_entry(NORM, path, layers, STOCK, reason))
    for path, block, row in blocks_of(model):
        down = None if row.mlp is None else child(block, row.mlp.down)
        if row.mlp is None or down is None or not is_adapted(down):
            continue
        reason = _activation_reason(block, row.mlp, down, switch)
        if not reason:
            block.__dict__[SHRINK] = switch
        layers = {row.mlp.down: down}
        status, reason = (STOCK, reason) if reason else (FUSED, _in_evaluation(layers))
        entries.append(_entry(ACTIVATION, path, layers, status, reason))
    return entries


def _entry(
    kind: str, path: str, layers: dict[str, Any], status: str, reason: str
) -> dict[str, Any]:  # fmt: skip
    return {
        "kind": kind, "name": path, "members": list(layers), "status": status, "reason": reason,
    }  # fmt: skip


def _in_evaluation(layers: dict[str, Any]) -> str:
    """Adapters that drop elements of x each multiply another x."""
    dropped = any(dropout_of(layer) > 0.0 for layer in layers.values())
    return "in evaluation only, since the adapters have dropout" if dropped else ""


def _first_layers(path: str, block: nn.Module) -> dict[str, Any]:
    """The adapted layers that take the input of the block, by name."""
    name = path.rpartition(".")[2]
    if is_adapted(block):
        return {name: block}
    row = row_for(block)
    if row is None or name in dict(row.elsewhere):
        return {}
    names = row.groups[0] if row.groups else ()
    if not names and row.mlp is not None:
        names = tuple(n for n in (row.mlp.gate, row.mlp.up) if n)
    found = {n: m for n in names if (m := child(block, n)) is not None}
    return {n: m for n, m in found.items() if is_adapted(m)}


def _norm_reason(norm: nn.Module, layers: dict[str, Any], switch: Switch, fused_norms: bool) -> str:
    """Why this norm makes no S for these layers; "" where it does."""
    reason = _switch_reason(switch, NORM, list(layers.values()))
    if reason:
        return reason
    if not fused_norms:
        return "fused_norms is False"
    if not is_norm(norm):
        return f"{type(norm).__name__} is not in the table of norms"
    for name, layer in layers.items():
        why = shrink_reason(layer)
        if why:
            return f"{name}: {why}"
    if len(layers) > 1 and group_of(next(iter(layers.values()))) is None:
        return "the layers are computed one by one"
    return look_at(norm, feeds=True)[0]


def _activation_reason(block: nn.Module, mlp: Mlp, down: nn.Module, switch: Switch) -> str:
    """Likewise of the activation of an MLP and its last layer."""
    first = [m for n in (mlp.gate, mlp.up) if n and (m := child(block, n)) is not None]
    layers = [m for m in first if is_adapted(m)]
    kind = activation_kind(child(block, mlp.act))
    whole = len(layers) == len(first) and not mlp.packed
    if switch == "auto" and not whole and _a_of(down).device.type != "cpu":
        return "only MLPs of separate layers, all of them adapted, are measured"
    reason = _switch_reason(switch, ACTIVATION, [*layers, down], kind)
    if reason:
        return reason
    if not issubclass(type(block), FusedMlp):
        return "the activation is the model's own"
    why = shrink_reason(down)
    return f"{mlp.down}: {why}" if why else ""


def _switch_reason(switch: Switch, pair: str, layers: list[Any], activation: str = "") -> str:
    a = _a_of(layers[-1])
    shapes: dict[str, Any] = {
        "K": layers[0].in_features, "N": tuple(x.out_features for x in layers),
        "rank": tuple(_a_of(x).shape[0] for x in layers), "adapter_dtype": a.dtype,
    }  # fmt: skip
    if activation:
        shapes["activation"] = activation
    return reason_against(switch, pair, a.device, _dtype_of(layers[-1], a), **shapes)


def _a_of(layer: Any) -> torch.Tensor:
    if isinstance(layer, LoRALinear):
        return layer.lora_A
    active = [a for a in layer.active_adapters if a in layer.lora_A] or list(layer.lora_A)
    weight: torch.Tensor = layer.lora_A[active[0]].weight
    return weight


def _dtype_of(layer: Any, a: torch.Tensor) -> torch.dtype:
    base = layer if isinstance(layer, LoRALinear) else layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        return weight.dtype
    return a.dtype
