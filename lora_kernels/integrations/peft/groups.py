"""Groups of LoRA layers that a block calls with one input: found, made and taken apart."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from lora_kernels.integrations.peft import linear
from lora_kernels.integrations.peft.quant_base import is_quantized
from lora_kernels.modules import grouped_linear, grouped_lora_linear
from lora_kernels.modules.blocks import blocks_of, groups_of, row_for, rows
from lora_kernels.modules.grouped_linear import GroupedLinear
from lora_kernels.modules.layer_group import AnyOperands, LayerGroup, group_of
from lora_kernels.modules.lora_linear import LoRALinear
from lora_kernels.modules.quant_linear import QuantLinear
from lora_kernels.modules.report import FUSED, STOCK
from lora_kernels.ops import _dispatch

KIND = "grouped_lora_linear"
_CLASSES: dict[Any, Any] = {**grouped_lora_linear.GROUPED, nn.Linear: GroupedLinear}


def form_groups(model: nn.Module) -> tuple[list[dict[str, Any]], list[LayerGroup]]:
    """(an entry of the report for each group of the table and each block that is not in it, the
    groups that this call made). Groups that no longer hold are taken apart."""
    entries, made, keep = [], [], set()
    for path, block, row in blocks_of(model):
        for names in groups_of(row, path):
            members = {n: m for n in names if (m := block._modules.get(n)) is not None}
            adapted = {n: m for n, m in members.items() if is_adapted(m)}
            if not adapted:
                continue
            first = next(iter(adapted.values()))
            joined = {n: m for n, m in members.items() if n in adapted or _joins(m, first)}
            reason = _reason(names, adapted, joined)
            if not reason and len(names) > 1:
                layers = list(joined.values())
                group = _existing(layers)
                if group is None:
                    group = LayerGroup(
                        path, layers, _operands_of(adapted), [n in adapted for n in joined]
                    )
                    made.append(group)
                keep.add(id(group))
            entries.append(_entry(path, list(adapted if reason else joined), reason))
    for module in model.modules():
        old = group_of(module)
        if old is not None and id(old) not in keep and len(old.members) > 1:
            take_apart(old)
    for group in made:
        put_together(group)
    return [*entries, *_unknown_blocks(model)], made


def dissolve_groups(model: nn.Module) -> None:
    for module in model.modules():
        group = group_of(module)
        if group is not None:
            take_apart(group)


def take_apart(group: LayerGroup) -> None:
    group.detach()
    for member in group.members:
        for stock, grouped in _CLASSES.items():
            if type(member) is grouped:
                member.__class__ = stock


def put_together(group: LayerGroup) -> None:
    for member in group.members:
        grouped = _CLASSES.get(type(member))
        if grouped is not None:
            member.__class__ = grouped
    group.attach()


def group_alone(path: str, layer: nn.Module) -> LayerGroup:
    """A group of one adapted layer, for the S that a norm in front of it makes."""
    group = LayerGroup(path, [layer], _operands_of({"": layer}))
    put_together(group)
    return group


def shrink_reason(layer: nn.Module) -> str:
    """Why this adapted layer takes no S that somebody else made; "" where it does."""
    if _quantized(layer):
        return "the weight is quantized"
    return "the adapter is DoRA" if _is_dora(layer) else _member_reason(layer)


def dropout_of(layer: nn.Module) -> float:
    return _dropout(layer)


def _entry(path: str, members: list[str], reason: str) -> dict[str, Any]:
    return {
        "kind": KIND, "name": path, "members": members,
        "status": STOCK if reason else FUSED, "reason": reason,
    }  # fmt: skip


def is_adapted(module: nn.Module) -> bool:
    return isinstance(module, (LoraLayer, LoRALinear))


def _existing(members: list[nn.Module]) -> LayerGroup | None:
    group = group_of(members[0])
    if group is None or group.dissolved or len(group.members) != len(members):
        return None
    same = all(a is b for a, b in zip(group.members, members, strict=True))
    return group if same and all(group_of(m) is group for m in members) else None


def _joins(module: nn.Module, adapted: Any) -> bool:
    """A layer without an adapter that can be computed together with this one."""
    weight = adapted.weight if isinstance(adapted, LoRALinear) else adapted.get_base_layer().weight
    layer: Any = module
    return not (_quantized(adapted) or _is_dora(adapted)) and (
        grouped_linear.can_join(layer)
        and layer.in_features == adapted.in_features
        and layer.weight.dtype == weight.dtype == grouped_linear.DTYPE
        and layer.__dict__.get("_hf_tp_plan") is None
    )


def _operands_of(adapted: dict[str, nn.Module]) -> Any:
    ours = isinstance(next(iter(adapted.values())), LoRALinear)
    return _operands_of_ours if ours else _operands_of_peft


def _operands_of_ours(layer: Any, x: Tensor) -> AnyOperands | None:
    plain = isinstance(layer, GroupedLinear)
    return (grouped_linear if plain else grouped_lora_linear).operands(layer, x)


def _operands_of_peft(layer: Any, x: Tensor) -> AnyOperands | None:
    plain = isinstance(layer, GroupedLinear)
    return (grouped_linear if plain else linear).operands(layer, x)


def _reason(
    names: tuple[str, ...], adapted: dict[str, nn.Module], joined: dict[str, nn.Module]
) -> str:
    """Why these layers are not computed together; "" when they are."""
    if _dispatch.disabled("grouped_lora_linear", "apply"):
        return "disabled by LORA_KERNELS_DISABLE"
    if len(names) == 1:
        return ""
    if len(joined) == 1:
        return f"only {next(iter(adapted))} has an adapter"
    for name, module in adapted.items():
        why = _member_reason(module)
        if why:
            return f"{name}: {why}"
    layers: list[Any] = list(adapted.values())
    if len({isinstance(m, LoRALinear) for m in layers}) > 1:
        return "the layers are of different libraries"
    if len({id(m) for m in layers}) < len(layers):
        return "two names are one layer"
    if len({m.in_features for m in layers}) > 1:
        return "the layers have inputs of different sizes"
    if len({_is_dora(m) for m in layers}) > 1:
        return "some of the adapters are DoRA"
    rates = {n: _dropout(m) for n, m in adapted.items()}
    if len(set(rates.values())) > 1:
        return f"the layers have different dropout: {rates}"
    dtypes = {_dtypes(m) for m in layers}
    if len(dtypes) > 1:
        return "the layers have different dtypes"
    return ""


def _quantized(module: Any) -> bool:
    if isinstance(module, LoRALinear):
        return isinstance(module, QuantLinear)
    return is_quantized(module.get_base_layer())


def _member_reason(module: Any) -> str:
    if "forward" in module.__dict__:
        return "the layer has a forward of its own on the instance"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "the layer has hooks"
    if isinstance(module, LoraLayer):
        if not getattr(type(module), "fused_by_lora_kernels", False):
            return "the layer is stock"
        active = [a for a in module.active_adapters if a in module.lora_A]
        if len(active) > 1:
            return "several adapters are active"
        return _dora_reason(module)
    if type(module) not in (*_CLASSES, *_CLASSES.values()):
        return f"{type(module).__name__} layers are computed one by one"
    return _dora_reason(module)


def _is_dora(module: Any) -> bool:
    if isinstance(module, LoRALinear):
        return module.lora_magnitude_vector is not None
    return _adapter(module) in module.lora_variant


def _dora_reason(module: Any) -> str:
    if _is_dora(module) and _dropout(module) > 0.0:
        return "the adapter is DoRA with dropout, under which each layer has an x of its own"
    return ""


def _adapter(module: LoraLayer) -> str:
    active = [a for a in module.active_adapters if a in module.lora_A]
    return active[0] if active else next(iter(module.lora_A))


def _dropout(module: Any) -> float:
    if isinstance(module, LoRALinear):
        return module.dropout
    return float(getattr(module.lora_dropout[_adapter(module)], "p", 0.0))


def _dtypes(module: Any) -> tuple[object, ...]:
    if _quantized(module):
        base = module if isinstance(module, LoRALinear) else module.get_base_layer()
        return "quantized", getattr(base, "compute_dtype", None)
    if isinstance(module, LoRALinear):
        return module.weight.dtype, module.lora_A.dtype
    return module.base_layer.weight.dtype, module.lora_A[_adapter(module)].weight.dtype


def _unknown_blocks(model: nn.Module) -> list[dict[str, Any]]:
    """Blocks that the table does not have, with adapted layers of the names that it has."""
    known = {name for row in rows().values() for group in row.groups for name in group}
    entries = []
    for path, block in model.named_modules():
        if row_for(block) is not None or isinstance(block, (nn.ModuleList, nn.Sequential)):
            continue
        sizes: dict[int, list[str]] = {}
        for name, child in block._modules.items():
            if name in known and child is not None and is_adapted(child):
                sizes.setdefault(child.in_features, []).append(name)
        for names in sizes.values():
            if len(names) > 1:
                reason = (
                    f"{type(block).__name__} is not in the table of blocks; "
                    "lora_kernels.modules.blocks.register_block adds it"
                )
                entries.append(_entry(path, names, reason))
    return entries
