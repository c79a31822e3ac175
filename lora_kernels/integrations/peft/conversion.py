"""Turn the LoRA layers of a built model into fused ones, and back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import MethodType
from typing import Any

from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn

from lora_kernels.errors import InvalidArgumentError, StrictFallbackError
from lora_kernels.integrations.peft import call_plan, eligibility
from lora_kernels.integrations.peft.fallback import warn_once
from lora_kernels.integrations.peft.groups import dissolve_groups, form_groups, take_apart
from lora_kernels.integrations.peft.linear import FusedLoraLinear, FusedQuantLoraLinear
from lora_kernels.integrations.peft.mlp_blocks import fuse_activations, mlp_blocks
from lora_kernels.integrations.peft.packed_price import packed_bytes_of
from lora_kernels.integrations.peft.quant_base import is_quantized, quantized_base
from lora_kernels.integrations.peft.report import ApplyReport
from lora_kernels.integrations.peft.rotary_blocks import fuse_rotary, rotary_blocks
from lora_kernels.integrations.peft.shrink_links import link, links_of, restore, unlink
from lora_kernels.integrations.transformers.attention import register_attention
from lora_kernels.integrations.transformers.causal_lm_loss import (
    fuse_loss,
    loss_is_fused,
    unfuse_loss,
)
from lora_kernels.integrations.transformers.rms_norms import fuse_norms, swap_back
from lora_kernels.integrations.transformers.rms_norms import to_stock as norm_to_stock
from lora_kernels.modules.handed_shrink import Switch, check_switch
from lora_kernels.modules.layer_group import LayerGroup
from lora_kernels.modules.quant_linear import QuantLinear
from lora_kernels.modules.report import FUSED, STOCK, LayerReport
from lora_kernels.modules.traversal import adapter_parameters
from lora_kernels.ops import _dispatch, explain

_ROWS = 1024  # of the problem for which the report names a backend


def apply(
    model: nn.Module, *, fused_loss: bool = False, recompute_activations: bool = False,
    fused_norms: bool = True, fused_rope: bool = True, fused_shrink: Switch = "auto",
) -> ApplyReport:  # fmt: skip
    """Let every LoRA linear of `model` that can be fused run fused.

    Works on a model that is already built: by ``get_peft_model``, ``PeftModel.from_pretrained``
    or the adapter methods of transformers, trained or not. Only the class of a layer changes:
    parameters, state dict, saved adapters, merging, adapter switching and wrapping (DDP, FSDP2)
    are untouched. Calling it again looks at the model anew, which is needed only after layers
    were added or when a layer that was stock has become fusable. Forward-mode differentiation and
    ``torch.func`` transforms run PEFT's forward; double backward raises. A model that is pickled
    whole while fused needs this package to load; adapters saved by PEFT never do.

    Layers that a block of a known class calls with one input (q/k/v, gate/up) are computed
    together by the first of them that is called; see docs/blocks.md. The report's groups list
    them, and say why not where not. The same is done for the layers of :func:`replace_modules`.
    From the first call on transformers knows ``attn_implementation="lora_kernels"``.

    ``LORA_KERNELS_DISABLE=apply`` (or ``lora_linear``) leaves every layer stock;
    ``LORA_KERNELS_DISABLE=grouped_lora_linear`` fuses each layer by itself, ``rope`` leaves the
    rotation to the model, ``gated_activation`` the activation.

    Args:
        fused_loss: causal language models compute the loss of a call with labels by
            ``lk.ops.linear_cross_entropy``, without logits; ``outputs.logits`` are made when
            they are read. The report's groups say which models do.
        recompute_activations: MLP blocks of known classes do not keep the activation for the
            backward but compute it again: less memory (docs/blocks.md), one more pass.
        fused_norms: RMS norms of known classes run on ``lk.ops.rms_norm`` where one of its kernels
            beats what the model spells out (docs/blocks.md). False gives them their own forward
            back.
        fused_rope: attention blocks of known classes rotate queries and keys by ``lk.ops.rope``
            wherever it has a kernel of its own. False gives them their own forward back.
        fused_shrink: the norm in front of q/k/v or gate/up, and the activation in front of the last
            layer of an MLP, make ``S = x A^T`` of these layers with x, which they then do not read
            once more for it. ``"auto"``: on a GPU where that was measured to be quicker, never on a
            CPU, where it is slower (docs/blocks.md). True: everywhere.

    Returns:
        The :class:`ApplyReport`; a model without LoRA layers gives an empty one.

    Raises:
        InvalidArgumentError: `model` is not a torch.nn.Module, or an unknown `fused_shrink`.
        StrictFallbackError: ``LORA_KERNELS_STRICT=1`` and a layer would be stock; nothing changed.
        BackendUnavailableError: ``LORA_KERNELS_BACKEND`` names a backend that cannot run a layer.
    """
    register_attention()
    return _apply(
        model, fused_loss, recompute_activations, fused_norms, fused_rope, fused_shrink
    )[0]  # fmt: skip


def unapply(model: nn.Module) -> int:
    """Give every fused layer and block of `model` its class back, and the loss its logits.

    Returns:
        How many layers and losses changed; 0 when none was fused. Norms and blocks are not
        counted.

    Raises:
        InvalidArgumentError: `model` is not a torch.nn.Module.
    """
    unlink(_checked(model))
    dissolve_groups(model)
    layers = sum(_to_stock(module) for module in model.modules())
    for module in model.modules():
        norm_to_stock(module)
    for change in [*mlp_blocks(model), *rotary_blocks(model)]:
        _swap(*change)
    return layers + unfuse_loss(model)


@contextmanager
def applied(
    model: nn.Module, *, fused_loss: bool = False, recompute_activations: bool = False,
    fused_norms: bool = True, fused_rope: bool = True, fused_shrink: Switch = "auto",
) -> Iterator[ApplyReport]:  # fmt: skip
    """``with applied(model) as report:`` fused inside; what it changed returns after.

    Raises:
        As :func:`apply`.
    """
    before, links = loss_is_fused(_checked(model)), links_of(model)
    report, changed, groups, norms = _apply(
        model, fused_loss, recompute_activations, fused_norms, fused_rope, fused_shrink
    )
    try:
        yield report
    finally:
        for group in groups:
            take_apart(group)
        for module in changed:
            if not _to_stock(module):
                for change in [*rotary_blocks(module, False), *mlp_blocks(module, False)]:
                    _swap(*change)
        for module in norms:
            swap_back(module)
        restore(model, links)
        if fused_loss and not before:
            unfuse_loss(model)


def _checked(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(
            f"model is a {type(model).__name__}; accepted: torch.nn.Module (a PEFT model)"
        )
    return model


def _apply(
    model: nn.Module, fused_loss: bool, recompute: bool, fused_norms: bool, fused_rope: bool,
    fused_shrink: Switch,
) -> tuple[ApplyReport, list[nn.Module], list[LayerGroup], list[nn.Module]]:  # fmt: skip
    check_switch(fused_shrink)
    layers: list[tuple[str, Any]] = [
        (n, m) for n, m in _checked(model).named_modules() if isinstance(m, LoraLayer)
    ]
    sharded = any("FSDPModule" in (c.__name__ for c in type(m).__mro__) for m in model.modules())
    entries, convertible = [], []
    for name, layer in layers:
        reason, able = _look_at(layer, sharded)
        entries.append(
            LayerReport(name, STOCK, reason)
            if reason
            else LayerReport(name, FUSED, backend=_backend(layer))
        )
        convertible.append(able)
    pairs = zip(layers, entries, strict=True)
    priced = [(layer, e.backend) for (_, layer), e in pairs if e.status == FUSED]
    report = ApplyReport(entries, packed_bytes=packed_bytes_of(priced))
    _announce(report)
    changed = []
    for (_, layer), able in zip(layers, convertible, strict=True):
        if able and _to_fused(layer):
            changed.append(layer)
        elif not able:
            _to_stock(layer)
    entries_of_groups, groups = form_groups(model)
    report.groups.extend(entries_of_groups)
    # A model of which no layer is fused computes what it did before, bit for bit.
    ours = bool(report.fused) or any(adapter_parameters(m) for m in model.modules())
    if fused_rope and ours:
        entries_of_rotations, rotations = fuse_rotary(model)
        report.groups.extend(entries_of_rotations)
        changed.extend(block for block, *classes in rotations if _swap(block, *classes))
    else:
        for change in list(rotary_blocks(model)):
            _swap(*change)
    if not (ours or recompute):
        for change in list(mlp_blocks(model)):
            _swap(*change)
    else:
        entries_of_mlps, mlps = fuse_activations(model, recompute)
        report.groups.extend(entries_of_mlps)
        changed.extend(block for block, *classes in mlps if _swap(block, *classes))
    if fused_loss:
        report.groups.extend(
            {"kind": "linear_cross_entropy", **asdict(entry)} for entry in fuse_loss(model)
        )
    report.shrinks.extend(link(model, fused_shrink if ours else False, fused_norms))
    entries_of_norms, norms = fuse_norms(model, fused_norms and ours)
    report.norms.extend(entries_of_norms)
    return report, changed, groups, norms


def _look_at(layer: LoraLayer, sharded: bool) -> tuple[str, bool]:
    """(why a call of the layer as it is now would be stock, whether to convert it).

    A layer of which only another adapter than the active one can be fused is converted too:
    what a call runs is decided on the call.
    """
    if _dispatch.disabled("lora_linear", "apply"):
        return "disabled by LORA_KERNELS_DISABLE", False
    known = stock_classes()
    if _plain_class(type(layer)) not in (*known, *known.values()):
        name = eligibility.qualified_name(type(layer))
        if isinstance(layer, Linear):
            return f"{name} is a subclass of lora.Linear that may compute something else", False
        return f"{name} has no fused path", False
    if "forward" in layer.__dict__:
        return "the layer has a forward of its own on the instance", False
    reasons = {adapter: _adapter_reason(layer, adapter, sharded) for adapter in layer.lora_A}
    if not reasons:
        return "the layer has no adapter", False
    able = "" in reasons.values()
    active = [adapter for adapter in layer.active_adapters if adapter in reasons]
    if len(active) > 1:
        return "several adapters are active", able
    return reasons[active[0]] if active else ("" if able else next(iter(reasons.values()))), able


def _adapter_reason(layer: LoraLayer, adapter: str, sharded: bool) -> str:
    parts = eligibility.parts_of(layer, adapter)
    reason = eligibility.layer_reason(layer, adapter, parts)
    if reason:
        return reason
    if is_quantized(parts.base):
        # What a call reads may not be there yet: quantization, shards, devices.
        return ""
    # A call checks again; by then weights on meta are loaded and FSDP2 has gathered its shards.
    found = eligibility.named_parameters(parts, eligibility.magnitude_of(layer, adapter))
    named = [(n, t) for n, t in found if not t.is_meta]
    if sharded:
        named = [(n, t) for n, t in named if type(t).__name__ != "DTensor"]
    return eligibility.parameters_reason(named) if named else ""


def _backend(layer: Any) -> str:
    adapter = next(iter(layer.r))
    base, _ = quantized_base(layer.base_layer) if is_quantized(layer.base_layer) else (None, "")
    if base is not None:
        s = base.q.spec
        answer = explain(
            "quant_linear", M=_ROWS, K=s.columns, N=s.rows, rank=layer.r[adapter],
            format=s.format, layout=s.layout, block_size=s.block_size,
            nested=s.nested_block_size > 0, act_order=s.act_order,
            dtype=base.compute_dtype or s.dtype, device=base.q.device.type,
        )  # fmt: skip
        return str(answer["backend"])
    if is_quantized(layer.base_layer):
        return "aten"
    weight = layer.base_layer.weight
    problem = explain(
        "lora_linear", M=_ROWS, K=layer.in_features, N=layer.out_features, rank=layer.r[adapter],
        dtype=weight.dtype, weight_dtype=weight.dtype, device=weight.device.type,
    )  # fmt: skip
    return str(problem["backend"])


def _announce(report: ApplyReport) -> None:
    """One warning per reason; in strict mode the first reason raises."""
    names: dict[str, list[str]] = {}
    for entry in report.stock:
        names.setdefault(entry.reason, []).append(entry.name)
    for reason, stock in names.items():
        which = f"{len(stock)} of {len(report.layers)} LoRA layers stay stock ({stock[0]}"
        which += ", ...)" if len(stock) > 1 else ")"
        if _dispatch.strict():
            raise StrictFallbackError(f"{which}: {reason}; unset LORA_KERNELS_STRICT to allow it")
        warn_once(reason, f"{which}: {reason}")


def _plain_class(cls: type) -> type:
    """The class that fully_shard made its subclass from, when a layer is wrapped by itself."""
    if cls.__name__.startswith("FSDP") and cls.__bases__[0].__name__ == "FSDPModule":
        return cls.__bases__[-1]
    return cls


def stock_classes() -> dict[type, type]:
    """Fused class -> PEFT's class. Those over bitsandbytes' and GPTQModel's layers are known once
    PEFT has imported its modules for them, before which no such layer exists."""
    known: dict[type, type] = {FusedLoraLinear: Linear, FusedQuantLoraLinear: Linear}
    if hasattr(sys.modules.get("peft.tuners.lora.bnb"), "Linear4bit"):
        from lora_kernels.integrations.peft.bitsandbytes_linear import STOCK_CLASSES as BITSANDBYTES

        known |= BITSANDBYTES
    if {"peft.tuners.lora.gptq", "peft.tuners.lora.awq"} <= set(sys.modules):
        from lora_kernels.integrations.peft.gptqmodel_linear import STOCK_CLASSES as GPTQMODEL

        known |= GPTQMODEL
    return known


def _to_fused(layer: Any) -> bool:
    """Change a stock layer into its fused class; False for any other module."""
    for fused, stock in stock_classes().items():
        if stock is Linear and (fused is FusedQuantLoraLinear) != _over_quant_linear(layer):
            continue
        if _swap(layer, stock, fused):
            return True
    return False


def _over_quant_linear(layer: Any) -> bool:
    return type(layer.get_base_layer()) is QuantLinear


def _to_stock(module: nn.Module) -> bool:
    """Change a fused layer back; False for any other module."""
    return any(_swap(module, fused, stock) for fused, stock in stock_classes().items())


def _swap(module: nn.Module, old: Any, new: Any) -> bool:
    """Change the class of a module of exactly class `old`; False for any other."""
    cls, was, now = type(module), old.forward, new.forward
    if _plain_class(cls) is not old:
        return False
    call_plan.forget(module)
    for key, value in module.__dict__.items():
        # accelerate keeps the method it wraps on the instance; it has to follow the class
        if getattr(value, "__func__", None) is was:
            module.__dict__[key] = MethodType(now, module)
    if cls is old:
        module.__class__ = new
    else:
        module.__class__ = type(
            f"FSDP{new.__name__}",
            (*cls.__bases__[:-1], new),
            {k: v for k, v in cls.__dict__.items() if k == "__deepcopy__"},
        )
    return True
